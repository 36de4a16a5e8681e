"""How much there is to measure and about how long that takes, told before it begins."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from deit.measure.measure import Result, first_batch
from deit.measure.networks import Group
from deit.measure.published import PUBLISHED
from deit.measure.roofline import Ceilings, bound
from deit.measure.subject import Settings
from deit.measure.timing import FEWEST

__all__ = ["Plan", "about"]

# Steps take longer than their matrix products at the ceilings.
SLOWNESS = {"cpu": 2.0, "cuda": 3.0}
# Passes beside the samples: warming up, memory, and one that says how many make a sample.
UNTIMED = {"cpu": 3, "cuda": 5}
# Seconds of compilation for each matrix product of a network, which it grows with.
COMPILING = {"cpu": 0.4, "cuda": 0.4}
# of those: a training step compiles a forward and a backward pass beside that of inference
TRAINING_GRAPHS = 3.5
# Trying kernels out takes longer than choosing one.
AUTOTUNING = 2.0


def about(seconds: float) -> str:
    """A rough duration in words: `about 20 s`, `about 3 min`, `about 1.5 h`."""
    if seconds < 90:
        return f"about {max(10 * round(seconds / 10), 10)} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


class Plan:
    """The groups to measure, with estimates that the time already spent corrects."""

    def __init__(
        self,
        groups: Sequence[Group],
        results: Mapping[str, Result],
        settings: Settings,
        batch_size: int | None,
        min_time: float,
        ceilings: Ceilings,
    ) -> None:
        self._networks = len(results)
        self._settings = settings
        self._compiling = {g: self._compile_seconds([results[n] for n in g.names]) for g in groups}
        self._left = {}
        for group in groups:
            members = [results[name] for name in group.names]
            batch, _ = first_batch(members, settings, batch_size, ceilings)
            timing = sum(self._timing(member, batch, min_time, ceilings) for member in members)
            self._left[group] = timing + self._compiling[group]
        self._done = 0.0
        self._start = time.monotonic()

    def _timing(self, result: Result, batch: int, min_time: float, ceilings: Ceilings) -> float:
        kind, size = self._settings.device.type, self._settings.dtype.itemsize
        seconds = 0.0
        for training in (False, True) if self._settings.train else (False,):
            rate = bound(result.products, batch, size, ceilings, training=training).images_per_s
            step = SLOWNESS.get(kind, SLOWNESS["cuda"]) * batch / rate
            seconds += UNTIMED.get(kind, UNTIMED["cuda"]) * step + max(min_time, FEWEST * step)
        return seconds

    def _compile_seconds(self, members: Sequence[Result]) -> float:
        mode, kind = self._settings.compile_mode, self._settings.device.type
        if mode is None:
            return 0.0
        graphs = TRAINING_GRAPHS if self._settings.train else 1.0
        each = COMPILING.get(kind, COMPILING["cuda"]) * (AUTOTUNING if "autotune" in mode else 1.0)
        return each * graphs * sum(len(member.products) for member in members)

    def text(self, *, default: bool) -> str:
        """Networks and time in words; `default` if the networks were not named."""
        groups, compiling = len(self._left), sum(self._compiling.values())
        text = f"{self._networks} networks in {groups} {'groups' if groups > 1 else 'group'}, "
        text += about(sum(self._left.values()))
        if compiling:
            text += f", of which compiling takes {about(compiling)}"
        if default and self._networks < len(PUBLISHED):
            text += (
                f"; these are the small ones of the {len(PUBLISHED)} published networks: "
                "name others by --models, or all of ours by --models '*'"
            )
        return text

    def finish(self, group: Group) -> None:
        """Say that a group is measured."""
        self._done += self._left.pop(group)

    def seconds_left(self) -> float:
        """Of all groups that are not finished, at the pace of those that are."""
        pace = (time.monotonic() - self._start) / self._done if self._done else 1.0
        return pace * sum(self._left.values())
