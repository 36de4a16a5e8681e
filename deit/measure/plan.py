"""About how long measuring takes, told before it begins."""

from __future__ import annotations

from collections.abc import Sequence

from deit.measure.bench_model import Settings
from deit.measure.measure import Result, first_batch
from deit.measure.roofline import PeakRates, bound
from deit.measure.timing import FEWEST

__all__ = ["about", "estimate"]

# Steps take longer than their matrix products at the peak rates, and some are run beside the
# samples: for warming up, memory, and the length of a sample.
SLOWNESS, UNTIMED = 2.5, 4
# Seconds of compilation for each matrix product of a network, which it grows with. A training step
# compiles a forward and a backward pass beside that of inference. Trying kernels out takes longer.
COMPILING, TRAINING_GRAPHS, AUTOTUNING = 0.4, 3.5, 2.0


def about(seconds: float) -> str:
    """A rough duration in words: `about 20 s`, `about 3 min`, `about 1.5 h`."""
    if seconds < 90:
        return f"about {max(10 * round(seconds / 10), 10)} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def estimate(
    members: Sequence[Result], settings: Settings, rates: PeakRates
) -> tuple[float, float]:
    """Seconds that the networks of a comparison take: to be timed, and to be compiled."""
    batch, _ = first_batch(members, settings, rates)
    timing = compiling = 0.0
    for member in members:
        for training in (False, True)[: 1 + settings.train]:
            best = bound(member.matmuls, batch, settings.dtype.itemsize, rates, training=training)
            step = SLOWNESS * batch / best.images_per_s
            timing += UNTIMED * step + max(settings.min_time, FEWEST * step)
        compiling += COMPILING * len(member.matmuls)
    if settings.compile_mode is None:
        return timing, 0.0
    compiling *= AUTOTUNING if "autotune" in settings.compile_mode else 1.0
    return timing, compiling * (TRAINING_GRAPHS if settings.train else 1.0)
