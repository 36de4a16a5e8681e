"""About how long measuring takes, told before it begins."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from deit.cli import duration
from deit.measure.measure import Result, first_batch
from deit.measure.roofline import TRAINING, PeakRates, bound
from deit.measure.timing import FEWEST
from deit.models.published import PUBLISHED

# Steps take longer than their matrix products at the peak rates, and some are run beside the
# samples: for warming up, memory, and the length of a sample.
SLOWNESS, UNTIMED = 2.5, 4
# Seconds of compilation for each matrix product of a network, which it grows with. A training step
# compiles a forward and a backward pass beside that of inference. Trying kernels out takes longer.
COMPILING, TRAINING_GRAPHS, AUTOTUNING = 0.4, 3.5, 2.0
Estimate = tuple[float, float]  # seconds: to be timed, and to be compiled


def estimate(members: Sequence[Result], args: Namespace, rates: PeakRates) -> Estimate:
    """Of the networks of a comparison."""
    batch, _ = first_batch(members, args, rates)
    timing = compiling = 0.0
    for member in members:
        best, _ = bound(member.matmuls, batch, args.dtype.itemsize, rates)
        for passes in (1, TRAINING)[: 1 + args.train]:
            step = SLOWNESS * passes * batch / best
            timing += UNTIMED * step + max(args.min_time, FEWEST * step)
        compiling += COMPILING * len(member.matmuls)
    if not args.compile:
        return timing, 0.0
    compiling *= AUTOTUNING if "autotune" in args.compile_mode else 1.0
    return timing, compiling * (TRAINING_GRAPHS if args.train else 1.0)


def describe(networks: int, estimates: Sequence[Estimate], *, default: bool) -> str:
    """Networks and time in words; `default` if the networks were not named."""
    timing, compiling = map(sum, zip(*estimates, strict=True))
    groups = len(estimates)
    text = f"{networks} networks in {groups} {'groups' if groups > 1 else 'group'}, "
    text += f"about {duration(timing + compiling)}"
    if compiling:
        text += f", of which compiling takes about {duration(compiling)}"
    if default and networks < len(PUBLISHED):
        text += (
            f"; these are the small ones of the {len(PUBLISHED)} published networks: "
            "name others by --models, or all of ours by --models '*'"
        )
    return text


def seconds_left(estimates: Sequence[Estimate], done: int, elapsed: float) -> float:
    """Of all comparisons behind the first `done`, at the pace of those."""
    planned = [sum(pair) for pair in estimates]
    return elapsed / sum(planned[:done]) * sum(planned[done:])
