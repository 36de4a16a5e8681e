"""Naming the dead: every process hears the heartbeat of every other and ends when one stops.

A collective whose partner has died waits for its time-out (NCCL) or fails with a network error
that names no rank (gloo). So each process also counts upwards in a small key-value store that
rank 0 serves, and reads the others' counters. A counter that stands still, or a failure that its
process reported, ends this process within half a minute, with one line that names rank and host.

Processes leave in an order, because the store goes with rank 0, and because launchers kill all that
are left once one has ended. A process that has nothing more to learn says that it is `gone`. Rank 0
waits for those words of all that live; a process that ends for another's fault waits for that one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from datetime import timedelta

import torch.distributed as dist

from deit.errors import EXIT_USER_ERROR, UserError, one_line

INTERVAL = 2.0
"""Seconds between two heartbeats."""
SILENCE = 20.0
"""Seconds without a new beat, or without an answer of the store, which rank 0 serves, that mean
death. They are counted by the waits of this process, not by the clock, so that a job that was
suspended as a whole stays alive."""
ARRIVAL = 300.0
"""Seconds that processes may start apart."""
PATIENCE = 4
"""So many intervals a process has to find for itself what another calls a user's error: most often
all find it, and rank 0 is to tell it."""
POLL = 0.1
"""Seconds between two looks at the store of a process that is about to leave."""
PRINTING = 0.5
"""Seconds in which a process that is gone prints why."""


class Watchdog:
    """Watches all processes of a job from a background thread; see the top of this file."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, address: str) -> None:
        """Connect, and wait until every rank has.

        Args:
            store: the rendezvous store, over which rank 0 tells its port.
            address: the host that rank 0 runs on.

        Raises:
            UserError: some ranks did not arrive.
        """
        self.rank = rank
        self._world_size = world_size
        self._host = socket.gethostname()
        self._failure: str | None = None
        self._users = False
        """Whether that failure is a UserError, which rank 0 prints as one line."""
        self._failures: dict[int, str] = {}
        self._beats = 0
        self._posting = threading.Lock()
        self._silent: dict[int, float] = {}
        self._hosts: dict[int, str] = {}
        self._closing = threading.Event()
        self._answers = 0
        self._store = self._connect(store, address)
        for body in (self._listen, self._judge_store):
            threading.Thread(target=body, name=body.__name__, daemon=True).start()
        self._await_arrivals()

    def _connect(self, store: dist.Store, address: str) -> dist.TCPStore:
        wait = timedelta(seconds=ARRIVAL)
        if self.rank == 0:
            own = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=wait)
            store.set("watchdog/port", str(own.port))
            return own
        try:
            store.wait(["watchdog/port"], wait)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"rank 0 on {address!r} did not arrive within {ARRIVAL:.0f} s: {one_line(error)}"
            ) from error
        port = int(store.get("watchdog/port"))
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=wait)

    def _await_arrivals(self) -> None:
        deadline = time.monotonic() + ARRIVAL
        while len(self._hosts) < self._world_size:
            if time.monotonic() > deadline:
                missing = [str(r) for r in range(self._world_size) if r not in self._hosts]
                raise UserError(
                    f"{len(missing)} of {self._world_size} processes did not arrive within "
                    f"{ARRIVAL:.0f} s: rank {', '.join(missing)}; were all of them started?"
                )
            time.sleep(0.05)

    def fail(self, error: BaseException) -> bool:
        """Tell the others that this process ends because of `error`.

        Returns:
            Whether rank 0, another process, ends for the same reason: one of them need say it.
        """
        self._failure = f"{type(error).__name__}: {one_line(error)}"[:300]
        self._users = isinstance(error, UserError)
        others = [rank for rank in range(self._world_size) if rank != self.rank]
        with contextlib.suppress(RuntimeError, OSError):  # rank 0 is gone already
            self._post()
        if self.rank == 0:
            self._wait_for(lambda: self._are_gone(others), SILENCE)
        else:
            self._wait_for(lambda: 0 in self._failures or self._are_gone([0]), SILENCE)
        self._say_gone()
        told = self.rank != 0 and self._failures.get(0) == self._failure
        if told:
            self._let_print(0)
        return told

    def blame(self) -> None:
        """After a broken collective: wait for the heartbeats to tell which rank is dead.

        Ends the process when they do; returns when all ranks are alive.
        """
        for _ in range(round(SILENCE / INTERVAL) + 3):  # as `_listen` counts
            time.sleep(INTERVAL)

    def close(self) -> None:
        """Stop watching; call on all ranks after a barrier."""
        self._closing.set()

    def _post(self) -> None:
        """Beat, and tell whether this process fails."""
        with self._posting:
            self._beats += 1
            beat = [self._beats, self._host, self._failure, self._users]
            self._store.set(f"beat/{self.rank}", json.dumps(beat))

    def _listen(self) -> None:
        """Beat and read the others' beats, once an interval."""
        present: list[int] = []
        seen: dict[int, int] = {}
        failing: dict[int, int] = {}
        waited = 0.0
        while not self._closing.is_set():
            try:
                self._post()
                if len(present) < self._world_size:
                    ranks = range(self._world_size)
                    present = [r for r in ranks if self._store.check([f"beat/{r}"])]
                values = self._store.multi_get([f"beat/{r}" for r in present])
            except (RuntimeError, OSError):
                return  # the connection is broken for good; `_judge_store` draws the conclusion
            self._answers += 1
            for other, value in zip(present, values, strict=True):
                count, host, failure, users = json.loads(value)
                self._hosts[other] = host
                if other == self.rank:
                    continue
                moved = seen.get(other) != count
                self._silent[other] = 0.0 if moved else self._silent[other] + waited
                seen[other] = count
                if failure:
                    self._failures[other] = failure
                    failing[other] = failing.get(other, 0) + 1
                    self._follow(other, failing[other], users)
                elif self._silent[other] >= SILENCE and self._failure is None:
                    self._end(
                        f"rank {other} on {host} has been silent for {SILENCE:.0f} s: "
                        "its process or node is dead"
                    )
            # Quick until everybody is there.
            waited = INTERVAL if len(present) == self._world_size else 0.1
            self._closing.wait(waited)

    def _follow(self, other: int, looks: int, users: bool) -> None:
        """End as rank `other` does, whose failure has been read `looks` times."""
        if self._failure is not None:
            return
        if users and other == 0:
            self._say_gone()
            self._let_print(0)
            if not self._closing.is_set() and self._failure is None:
                os._exit(EXIT_USER_ERROR)
        elif not users or looks > PATIENCE:
            host = self._hosts[other]
            self._end(f"rank {other} on {host} failed: {self._failures[other]}", after=other)

    def _judge_store(self) -> None:
        """Notice a store that stopped answering, which can block `_listen` for long."""
        answers, missed = -1, 0
        while not self._closing.wait(INTERVAL):
            missed = 0 if self._answers != answers else missed + 1
            answers = self._answers
            if missed * INTERVAL >= SILENCE and self.rank != 0:
                host = self._hosts.get(0, "an unknown host")
                self._exit(f"rank 0 on {host} cannot be reached: its process or node is dead")

    def _end(self, why: str, after: int | None = None) -> None:
        """End this process, unless its main thread fails by itself, whose error tells more.

        Args:
            after: the rank that is to print first.
        """
        self._say_gone()
        if self.rank == 0:
            # The store goes with this process; let the others find the same cause in it first.
            living = [rank for rank, seconds in self._silent.items() if seconds < SILENCE / 2]
            self._wait_for(lambda: self._are_gone(living), SILENCE)
        if after is not None:
            self._let_print(after)
        if self._failure is None:
            self._exit(why)

    def _exit(self, why: str) -> None:
        """End this process at once: its main thread may be stuck in a collective."""
        if self._closing.is_set():
            return
        sys.stdout.flush()
        line = f"error: {why}; ending rank {self.rank} on {self._host}, resume with --resume auto"
        print(line, file=sys.stderr, flush=True)
        os._exit(1)

    def _say_gone(self) -> None:
        with contextlib.suppress(RuntimeError, OSError):
            self._store.set(f"gone/{self.rank}", "")

    def _are_gone(self, ranks: Collection[int]) -> bool:
        return not ranks or self._store.check([f"gone/{rank}" for rank in ranks])

    def _let_print(self, rank: int) -> None:
        """Wait until `rank` is gone and has printed why."""
        self._wait_for(lambda: self._are_gone([rank]), 2 * INTERVAL)
        time.sleep(PRINTING)

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for `condition`, but not longer than `seconds`, nor when the store is gone."""
        for _ in range(round(seconds / POLL)):
            try:
                if condition():
                    return
            except (RuntimeError, OSError):
                return
            time.sleep(POLL)
