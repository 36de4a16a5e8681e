"""Which implementation of an operation runs: measured on the device at hand, held to the plain one.

An operation has one plain implementation, written with torch's own operations, and faster
candidates. The first call with given shapes compares every candidate with the plain one and times
those that agree; later calls run the fastest. A candidate that raises or disagrees is dropped with
one warning, so hardware that nobody tried a kernel on costs a warning and never a wrong result.
Which candidate is fastest can change from run to run where times are close, and results then
differ by rounding.

Nothing is timed for tensors on a CPU, while `torch.use_deterministic_algorithms` is on, or with
DEIT_KERNELS_TUNE=0 in the environment: then the first candidate, in the order in which the
operation lists them, that agrees with the plain one runs. While a CUDA graph is being captured
nothing can be compared, so shapes that were not seen before run the plain implementation. Want of
memory is the caller's affair: a candidate that meets with it raises, or if it was only being tried,
is left out for those shapes.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Candidate", "Decision", "Tuner", "bucket", "choose", "only", "report", "run"]

# Largest accepted ||candidate - plain|| / ||plain||. Both round their results (half an ulp is
# 2e-3 of bfloat16 and 2.4e-4 of float16), the plain one its intermediate results too; "tf32" is
# for float32 products that may round their factors to ten bits.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 3e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
    "tf32": 4e-3,
}
# Calls in which the plain result was zero or not finite, so that nothing could be judged, after
# which the plain implementation is kept.
MAX_UNJUDGED = 200
CYCLES_OF_A_LAUNCH = 200_000  # of a GPU: about 0.1 ms, the longest that a call keeps Python busy
CHECKED_AT_ONCE = 1 << 24  # elements: bounds the memory that a comparison takes


class Candidate(NamedTuple):
    """An implementation: `run` maps tensors (and constants) to one new tensor or a tuple of them.

    `run` must not depend on the shapes of the call for which the candidate was made.
    """

    name: str
    run: Callable[..., Any]


class Decision(NamedTuple):
    """A row of `report`: milliseconds of each candidate that was timed, plain one included."""

    op: str
    device: str
    dtype: torch.dtype
    key: Hashable
    chosen: str
    milliseconds: dict[str, float]


Timer = Callable[[Callable[[], Any], float], float]


def bucket(rows: int) -> int:
    """The class of row counts that share a decision: up to the next power of two."""
    return max(rows - 1, 0).bit_length()


def tf32_allowed() -> bool:
    """Whether torch may compute float32 matrix products on CUDA devices with tf32 factors."""
    matmul = torch.backends.cuda.matmul
    # Reading the old flag is an error after somebody has set the new one (torch >= 2.9).
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def _may_round_factors(op: str) -> bool:
    """Whether either side of a comparison in float32 on a CUDA device may use tf32 factors."""
    if "depthwise" not in op:
        return tf32_allowed()
    convolution = getattr(torch.backends.cudnn, "conv", None)  # as above
    precision = getattr(convolution, "fp32_precision", None)
    return torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _timing_allowed(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and not torch.are_deterministic_algorithms_enabled()
        and os.environ.get("DEIT_KERNELS_TUNE", "1") != "0"
    )


def cuda_milliseconds(
    run: Callable[[], Any], best: float = inf, *, without_launches: bool = False
) -> float:
    """Milliseconds of one of many calls in a row: the best of three groups of calls.

    What takes three times longer than `best` is not measured more than once. `without_launches`
    measures the GPU alone: it waits until the calls are in its queue.
    """

    def group(repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if without_launches:
            torch.cuda._sleep(repeats * CYCLES_OF_A_LAUNCH)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats

    group(1)
    estimate = group(2)
    if estimate > 3 * best:
        return estimate
    repeats = max(2, min(20, int(1.0 / max(estimate, 1e-3))))
    return min(group(repeats) for _ in range(3))


def _tensors(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs that hold something."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    return tuple(t for t in outputs if t.numel())


def _judgeable(expected: Sequence[Tensor]) -> bool:
    """Whether every output is finite and not all zero."""
    largest = [float(torch.linalg.vector_norm(t, inf)) for t in expected]
    return all(0 < value < inf for value in largest)


def _disagreement(expected: Tensor, actual: Tensor, tolerance: float) -> str | None:
    """What is wrong with `actual`, if anything.

    The error is bounded in each row and each column, relative to the norm of that row or column
    of `expected` plus that of a typical one: wrong values in one ragged corner are a negligible
    part of the whole tensor's norm.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"gave {tuple(actual.shape)} {actual.dtype}, not {tuple(expected.shape)}"
    expected, actual = (t.reshape(-1, t.shape[-1]) for t in (expected, actual))
    columns = expected.shape[1]
    chunk = max(1, CHECKED_AT_ONCE // columns)
    work = torch.float64 if expected.dtype == torch.float64 else torch.float32
    row_error, row_norm = [], []
    column_error = column_norm = torch.zeros((), dtype=torch.float64, device=expected.device)
    for e, a in zip(expected.split(chunk), actual.split(chunk), strict=True):
        norm, error = e.to(work).square(), (a.to(work) - e.to(work)).square()
        row_error.append(error.sum(1))
        row_norm.append(norm.sum(1))
        column_error = column_error + error.sum(0)
        column_norm = column_norm + norm.sum(0)
    for kind, error, norm in (
        ("row", torch.cat(row_error), torch.cat(row_norm)),
        ("column", column_error, column_norm),
    ):
        excess = error.sqrt() / (norm.sqrt() + norm.mean().sqrt())
        worst = float(excess.max())  # NaN if there is one
        if not worst <= tolerance:
            return f"differs from the plain implementation by {worst:.1e} of a {kind}'s norm"
    return None


class Tuner:
    """Decisions of one process; see the module's docstring.

    Args:
        timer: (call, best so far) -> milliseconds of the call.
        timing_allowed: whether candidates on a device may be timed.
    """

    def __init__(
        self,
        timer: Timer = cuda_milliseconds,
        timing_allowed: Callable[[torch.device], bool] = _timing_allowed,
    ) -> None:
        self._timer, self._timing_allowed = timer, timing_allowed
        self._chosen: dict[tuple, Candidate] = {}
        self._decisions: dict[tuple, Decision] = {}
        self._dropped: set[tuple] = set()
        self._warned: set[str] = set()
        self._unjudged: dict[tuple, int] = {}
        self._forced: str | None = None

    def run(
        self,
        op: str,
        key: Hashable,
        plain: Candidate,
        candidates: Callable[[], Sequence[Candidate]],
        *args: Any,
    ) -> Any:
        """The result of `op` on `args`, computed by the candidate that was chosen for `key`.

        Args:
            op: name of the operation.
            key: what the choice depends on besides the first tensor's device and dtype.
            plain: the implementation that is right by definition.
            candidates: gives all candidates, the plain one included, the preferred one first.
            args: passed on; the first one is a tensor.
        """
        x: Tensor = args[0]
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):  # Triton launches on the current one
                return self._run(op, key, plain, candidates, x, args)
        return self._run(op, key, plain, candidates, x, args)

    def _run(
        self,
        op: str,
        key: Hashable,
        plain: Candidate,
        candidates: Callable[[], Sequence[Candidate]],
        x: Tensor,
        args: tuple,
    ) -> Any:
        if self._forced is not None:
            return self._named(self._forced, candidates(), plain).run(*args)
        timed = self._timing_allowed(x.device)
        full = (op, _device_name(x.device), x.dtype, key, timed)
        choice = self._chosen.get(full)
        if choice is plain or x.numel() == 0:
            return plain.run(*args)
        if choice is None:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return plain.run(*args)
            return self._decide(full, plain, candidates(), args)
        try:
            return choice.run(*args)
        except torch.OutOfMemoryError:  # no fault of the candidate
            raise
        except Exception as error:
            self._drop(full, choice, error)
        return plain.run(*args)

    def choose(
        self,
        op: str,
        key: Hashable,
        plain: Candidate,
        candidates: Callable[[], Sequence[Candidate]],
        device: torch.device,
        dtype: torch.dtype,
        inputs: Callable[[], tuple],
    ) -> str:
        """The name of the candidate that `run` would take, for code that is being compiled.

        Args:
            op, key, plain, candidates: as of `run`.
            device, dtype: of the first tensor.
            inputs: makes arguments to try the candidates on. They are timed on the GPU alone:
                compiled code, unlike Python, launches faster than most kernels run.
        """
        if self._forced is not None:
            return self._named(self._forced, candidates(), plain).name
        full = (op, _device_name(device), dtype, key, self._timing_allowed(device))
        if full not in self._chosen:
            timer = self._timer
            if timer is cuda_milliseconds:
                timer = functools.partial(timer, without_launches=True)
            self._decide(full, plain, candidates(), inputs(), timer)
        return self._chosen.get(full, plain).name

    def _decide(
        self,
        full: tuple,
        plain: Candidate,
        candidates: Sequence[Candidate],
        args: tuple,
        timer: Timer | None = None,
    ) -> Any:
        """Choose for the key `full`; returns the plain result for `args`."""
        outputs = plain.run(*args)
        candidates = [c for c in candidates if (*full[:3], c.name) not in self._dropped]
        times: dict[str, float] = {}
        choice = plain
        if any(c is not plain for c in candidates):
            expected = _tensors(outputs)
            if not _judgeable(expected):
                self._unjudged[full] = self._unjudged.get(full, 0) + 1
                if self._unjudged[full] >= MAX_UNJUDGED:
                    self._settle(full, plain, times)
                return outputs
            agreeing = (
                c for c in candidates if c is plain or self._agrees(full, c, expected, args)
            )
            if full[-1]:
                timer = self._timer if timer is None else timer
                choice, times = self._fastest(full, plain, agreeing, args, timer)
            else:
                choice = next(agreeing, plain)
        self._settle(full, choice, times)
        return outputs

    def _fastest(
        self,
        full: tuple,
        plain: Candidate,
        candidates: Iterable[Candidate],
        args: tuple,
        timer: Timer,
    ) -> tuple[Candidate, dict[str, float]]:
        choice, best, times = plain, inf, {}
        for candidate in candidates:
            try:
                time = timer(functools.partial(candidate.run, *args), best)
            except Exception as error:
                self._drop(full, candidate, error)
                continue
            times[candidate.name] = time
            if time < best:
                best, choice = time, candidate
        return choice, times

    def _settle(self, full: tuple, choice: Candidate, times: dict[str, float]) -> None:
        self._chosen[full] = choice
        self._decisions[full] = Decision(*full[:4], choice.name, times)

    def _agrees(
        self, full: tuple, candidate: Candidate, expected: Sequence[Tensor], args: tuple
    ) -> bool:
        # Freed at once: the allocator is likely to give this memory to the candidate, and what it
        # forgets to write is then NaN rather than an earlier, right result.
        [torch.full_like(t, torch.nan) for t in expected]
        try:
            actual = _tensors(candidate.run(*args))
            if len(actual) != len(expected):
                raise RuntimeError(f"gave {len(actual)} outputs, not {len(expected)}")
            for e, a in zip(expected, actual, strict=True):
                tf32 = e.dtype == torch.float32 and e.is_cuda and _may_round_factors(full[0])
                wrong = _disagreement(e, a, TOLERANCES["tf32" if tf32 else e.dtype])
                if wrong is not None:
                    raise RuntimeError(wrong)
        except Exception as error:
            self._drop(full, candidate, error)
            return False
        return True

    def _drop(self, full: tuple, candidate: Candidate, error: Exception) -> None:
        """Never use this candidate of the operation again on this device with this dtype.

        One that there was not enough memory to try is only left out of this decision.
        """
        op, device, dtype = full[:3]
        if not isinstance(error, torch.OutOfMemoryError):
            self._dropped.add((op, device, dtype, candidate.name))
            for other, choice in list(self._chosen.items()):  # decided again at the next call
                if other[:3] == full[:3] and choice.name == candidate.name:
                    self._chosen.pop(other, None)
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"{op} runs without its implementation {candidate.name!r} on {device} with "
                f"{dtype}: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )

    @staticmethod
    def _named(prefix: str, candidates: Sequence[Candidate], plain: Candidate) -> Candidate:
        return next((c for c in candidates if c.name.startswith(prefix)), plain)

    def report(self) -> list[Decision]:
        """What was chosen so far, in order, with the times that decided it."""
        return list(self._decisions.values())

    @contextmanager
    def only(self, prefix: str) -> Iterator[None]:
        """Run the first candidate whose name starts with `prefix`, unchecked; for measurements.

        Operations without such a candidate run their plain implementation.
        """
        before, self._forced = self._forced, prefix
        try:
            yield
        finally:
            self._forced = before


_TUNER = Tuner()
run = _TUNER.run
choose = _TUNER.choose
report = _TUNER.report
only = _TUNER.only
