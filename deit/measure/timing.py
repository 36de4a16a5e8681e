"""Timing of several networks in turns, so that what drifts, drifts for all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from statistics import median, quantiles

import torch

from deit.measure.hardware import synchronize

# Samples of each network that `min_time` is divided into, and the fewest that give a median.
SAMPLES = 10
FEWEST = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one step: every sample, in order of measurement."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        low, _, high = quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def alternate(
    steps: Mapping[str, Callable[[], object]],
    device: torch.device,
    min_time: float,
    on_sample: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Time each of `steps` for at least `min_time` seconds, one sample of each in every round.

    A sample is as many steps as fill a tenth of `min_time`, at least one. Rounds run alternately
    forwards and backwards. The steps must have been run before, and so be compiled and warm.

    Args:
        on_sample: called with the name after each sample.
    """

    def sample(name: str, repeats: int) -> float:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            steps[name]()
        synchronize(device)
        return (time.perf_counter() - begin) / repeats

    repeats = {name: max(1, ceil(min_time / SAMPLES / sample(name, 1))) for name in steps}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    while any(
        len(found) < FEWEST or sum(found) * repeats[name] < min_time
        for name, found in samples.items()
    ):
        for name in order:
            samples[name].append(sample(name, repeats[name]))
            on_sample(name)
        order.reverse()
    return {name: Timing(tuple(values)) for name, values in samples.items()}
