"""Stopping between two updates: on signals, on request, and on every process at the same one.

The first SIGINT (Ctrl-C), SIGTERM or SIGUSR1 asks for a stop: training saves at the next update
boundary and ends with status 0. A second Ctrl-C quits at once and saves nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher passes on the Ctrl-C that the terminal has already sent to its whole process group:
# two interrupts so close together are one.
_DOUBLE_INTERRUPT = 1.0

_reason: str | None = None


class Stopped(Exception):
    """Raised on every process at the agreed update boundary; the text is the reason."""


def request_stop(reason: str) -> None:
    """Ask for a checkpoint and a stop at the next update. Callable from any thread or handler."""
    global _reason
    if _reason is None:
        _reason = reason


def stop_reason() -> str | None:
    """Why a stop has been asked for in this process, or None."""
    return _reason


def forget_stop() -> None:
    """Forget an earlier request (a second training in one process)."""
    global _reason
    _reason = None


@contextlib.contextmanager
def stop_on_signals(announce: bool = True) -> Iterator[None]:
    """Turn SIGTERM, SIGUSR1 and Ctrl-C into stop requests while the body runs.

    Signals that somebody else already handles (a launcher such as submitit) stay with them.

    Args:
        announce: tell on stderr that the signal was understood.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted_at: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            now = time.monotonic()
            if interrupted_at and now - interrupted_at[0] > _DOUBLE_INTERRUPT:
                raise KeyboardInterrupt
            interrupted_at.append(now)
        if announce and _reason is None:
            again = "; Ctrl-C again quits at once" if number == signal.SIGINT else ""
            # Not print(): the handler may interrupt a print. Nobody may read it, as when Ctrl-C has
            # ended a `tee` too.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{name}: stopping after this update{again}\n".encode())
        request_stop(name)

    # Ignored too: shells start background jobs with an ignored SIGINT.
    free = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)
    previous = {s: signal.getsignal(s) for s in _SIGNALS if signal.getsignal(s) in free}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopAgreement:
    """Lets all processes stop at the same update, whichever of them was asked to.

    Each `poll` reads the outcome of the reduction that the previous one started, so nobody waits
    for it: the price is a stop one update late.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """`group`: a gloo group of all processes, or None for a single process."""
        self._group = group
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    def poll(self) -> None:
        """Call on every process at the same points.

        Raises:
            Stopped: somewhere a stop was asked for; on all processes at the same call.
        """
        if self._group is None:
            if _reason is not None:
                raise Stopped(_reason)
            return
        self.finish()
        if self._flag.item():
            request_stop("asked for in another process")
            raise Stopped(_reason)
        self._flag.fill_(_reason is not None)
        self._work = dist.all_reduce(
            self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )

    def finish(self) -> None:
        """Wait for the reduction that is under way, so that the group can be taken down."""
        if self._work is not None:
            self._work.wait()
            self._work = None
