"""Which images an epoch shows, in which order, with which randomness: a pure function of the seed.

In an epoch the samples form one global sequence of positions 0, 1, ..., len(dataset) - 1. Position
p holds image permutation[p // repeats], where the permutation is drawn from (seed, epoch): with
repeated augmentation (Hoffer et al. 2020; Berman et al. 2019) every image comes `repeats` times in
a row and the epoch keeps its length. Step t of W processes with batch size B takes positions t W B
... (t + 1) W B - 1, process r every W-th of them from the r-th on. All randomness of a sample is
seeded from (seed, epoch, position).

So neither the number of workers, nor how a global batch is split over processes, nor a restart in
the middle of an epoch changes what is trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import torch

from deit.errors import UserError


class Sample(NamedTuple):
    """One item of a batch: which image, and where it stands."""

    index: int
    epoch: int
    position: int


@dataclass
class ResumableBatchSampler:
    """Batch sampler: the batches of one process from (start_epoch, start_step) to the end.

    It yields lists of `batch_size` Samples; the last, incomplete global batch of an epoch is
    dropped. Raises UserError if the data set is smaller than one global batch.
    """

    length: int
    _: KW_ONLY
    batch_size: int
    epochs: int
    start_epoch: int = 0
    start_step: int = 0
    seed: int = 0
    world_size: int = 1
    rank: int = 0
    repeats: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)
        global_batch = self.batch_size * self.world_size
        self.steps_per_epoch = self.length // global_batch
        if self.steps_per_epoch == 0:
            raise UserError(
                f"the training set has {self.length} images, fewer than one global batch of "
                f"{global_batch} ({self.batch_size} on each of {self.world_size} processes): "
                f"choose a batch size of at most {self.length // self.world_size}"
            )
        if not 0 <= self.start_step <= self.steps_per_epoch:
            raise UserError(
                f"cannot start at step {self.start_step} of an epoch of {self.steps_per_epoch} "
                "steps; were the data set, batch size or number of processes others before?"
            )

    def __len__(self) -> int:
        return max(0, (self.epochs - self.start_epoch) * self.steps_per_epoch - self.start_step)

    def __iter__(self) -> Iterator[list[Sample]]:
        step = self.start_step
        for epoch in range(self.start_epoch, self.epochs):
            order = self.permutation(epoch)
            for current in range(step, self.steps_per_epoch):
                yield self._batch(order, epoch, current)
            step = 0

    def permutation(self, epoch: int) -> np.ndarray:
        """The order (N,) of the images in `epoch`."""
        generator = np.random.Generator(np.random.PCG64(_entropy(self.seed, epoch)))
        return generator.permutation(self.length)

    def _batch(self, order: np.ndarray, epoch: int, step: int) -> list[Sample]:
        start = step * self.batch_size * self.world_size + self.rank
        positions = start + self.world_size * np.arange(self.batch_size)
        indices = order[positions // self.repeats]
        return [
            Sample(index, epoch, position)
            for index, position in zip(indices.tolist(), positions.tolist(), strict=True)
        ]


def evaluation_batches(
    length: int, batch_size: int, *, world_size: int = 1, rank: int = 0
) -> list[list[int]]:
    """Images rank, rank + world_size, ... in order: over all ranks every image exactly once.

    Nothing is padded or dropped, so that ranks may get different numbers of batches, even none.
    """
    indices = list(range(rank, length, world_size))
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


class SampleSeeds(NamedTuple):
    """Independent 63-bit seeds of one sample, for its transform and for its random erasing."""

    transform: int
    erasing: int


def sample_seeds(seed: int, epoch: int, position: int) -> SampleSeeds:
    """The seeds of the sample at `position` of `epoch`."""
    words = _entropy(seed, epoch, position).generate_state(2, np.uint64)
    return SampleSeeds(int(words[0]) >> 1, int(words[1]) >> 1)


def _entropy(seed: int, *key: int) -> np.random.SeedSequence:
    # keys of different lengths differ: the permutation has (epoch,), a sample (epoch, position)
    return np.random.SeedSequence(seed, spawn_key=key)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's CPU generators, which transforms draw from."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - timm draws from the global one
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset the devices' too


@contextmanager
def preserve_generators() -> Iterator[None]:
    """Restore the global CPU generators of Python, numpy and torch afterwards."""
    python, numpy, ours = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(ours)
