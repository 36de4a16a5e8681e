"""Naming the dead: every process hears the heartbeat of every other and ends when one stops.

A collective whose partner has died waits for its time-out (NCCL) or fails with a network error
that names no rank (gloo). So each process also counts upwards in a small key-value store that
rank 0 serves, and reads the others' counters. A counter that stands still, or a failure that its
process reported, ends this process within half a minute, with one line that names rank and host.

Processes leave together, because the store goes with rank 0, and because launchers kill all that
are left once one has ended. A process that has nothing more to learn says that it is `gone`. Rank 0
waits for that word of all that live, then says that all is `over`; until then nobody ends. Those
that fail by themselves print first.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType

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
"""Seconds for those that fail to print why, before those end that follow them."""


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore SIGTERM within, and while the error is printed.

    This process ends in any case, and a launcher sends the signal as soon as another one has ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    end = math.inf

    def on_signal(number: int, frame: FrameType | None) -> None:
        if time.monotonic() > end:
            signal.signal(number, before or signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        end = time.monotonic() + PRINTING


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
        self._error: BaseException | None = None
        self._failure: str | None = None
        """`_error` as the others are to hear of it."""
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
        try:
            self._await_arrivals()
        except UserError:
            self.close()
            raise

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
        self.note(error)
        with _undisturbed():
            return self._fail()

    def _fail(self) -> bool:
        with contextlib.suppress(RuntimeError, OSError):  # rank 0 is gone already
            self._post()
        if self.rank != 0:
            self._wait_for(lambda: 0 in self._failures or self._is_set("gone/0"), SILENCE)
        self._leave()
        told = self.rank != 0 and self._failures.get(0) == self._failure
        if told:
            time.sleep(PRINTING)
        return told

    def note(self, error: BaseException) -> None:
        """This process is about to fail because of `error`: nothing else is to end it."""
        self._error = error
        self._users = isinstance(error, UserError)
        self._failure = f"{type(error).__name__}: {one_line(error)}"[:300]

    def _leave(self) -> None:
        """Say that this process has nothing more to learn; wait until that is so for all."""
        if self.rank != 0 or self._failure is None:  # else the others are to hear of that
            self._say(f"gone/{self.rank}")
        if self.rank == 0:
            self._wait_for(self._all_are_gone, SILENCE)
            self._say("over")
        else:
            self._wait_for(lambda: self._is_set("over"), SILENCE + 2 * INTERVAL)

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
                    missing = [r for r in ranks if r not in present]
                    present += [r for r in missing if self._is_set(f"beat/{r}")]
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
                        "its process or node is dead",
                        fault=other,
                    )
            # Quick until everybody is there.
            waited = INTERVAL if len(present) == self._world_size else 0.1
            self._closing.wait(waited)

    def _follow(self, other: int, looks: int, users: bool) -> None:
        """End as rank `other` does, whose failure has been read `looks` times."""
        if self._failure is not None:
            return
        if users and other == 0:
            self._leave()
            time.sleep(PRINTING)
            if not self._closing.is_set() and self._failure is None:
                os._exit(EXIT_USER_ERROR)
        elif not users or looks > PATIENCE:
            host = self._hosts[other]
            self._end(f"rank {other} on {host} failed: {self._failures[other]}", other, failed=True)

    def _judge_store(self) -> None:
        """Notice a store that stopped answering, which can block `_listen` for long."""
        answers, missed = -1, 0
        while not self._closing.wait(INTERVAL):
            missed = 0 if self._answers != answers else missed + 1
            answers = self._answers
            if missed * INTERVAL >= SILENCE and self.rank != 0:
                host = self._hosts.get(0, "an unknown host")
                self._exit(f"rank 0 on {host} cannot be reached: its process or node is dead")

    def _end(self, why: str, fault: int, failed: bool = False) -> None:
        """End this process, unless its main thread fails by itself, whose error tells more.

        Args:
            fault: the rank that is the cause.
            failed: it says so itself, and is to print first.
        """
        if fault != 0 or failed:  # a silent rank 0 never calls it over
            self._leave()
        if failed:
            time.sleep(PRINTING)
        if self._failure is None:
            self._exit(why)

    def _exit(self, why: str) -> None:
        """End this process at once: its main thread may be stuck in a collective."""
        if self._closing.is_set():
            return
        lines = [
            f"error: {why}; ending rank {self.rank} on {self._host}, resume with --resume auto\n"
        ]
        if isinstance(self._error, UserError):
            lines.insert(0, f"error: {one_line(self._error)}\n")
        elif self._error is not None:
            lines[:0] = traceback.format_exception(self._error)
        try:
            os.write(2, "".join(lines).encode())
            sys.stdout.flush()
        except (OSError, ValueError):
            pass  # a full disk or a closed pipe must not keep a process alive
        finally:
            os._exit(1)

    def _say(self, key: str) -> None:
        with contextlib.suppress(RuntimeError, OSError):
            self._store.set(key, "")

    def _is_set(self, *keys: str) -> bool:
        return not keys or self._store.check(list(keys))

    def _all_are_gone(self) -> bool:
        """Whether every other rank is, as far as it lives."""
        living = [rank for rank, seconds in list(self._silent.items()) if seconds < SILENCE / 2]
        return self._is_set(*(f"gone/{rank}" for rank in living))

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for `condition`, but not longer than `seconds`, nor when the store is gone."""
        for _ in range(round(seconds / POLL)):
            try:
                if condition():
                    return
                self._answers += 1  # for `_judge_store`: `_listen` itself may be waiting here
            except (RuntimeError, OSError):
                return
            time.sleep(POLL)
