"""Which samples come when."""

from __future__ import annotations

import random
from itertools import chain, islice

import numpy as np
import pytest
import torch

from deit.data import ResumableBatchSampler
from deit.data.stream import preserve_generators, sample_seeds, seed_everything
from deit.errors import UserError


def stream(length=50, **options) -> ResumableBatchSampler:
    return ResumableBatchSampler(length, **{"batch_size": 8, "epochs": 3, "seed": 5, **options})


def test_an_epoch_is_a_permutation_without_the_last_incomplete_batch():
    batches = list(stream())
    assert len(batches) == len(stream()) == 3 * stream().steps_per_epoch == 18
    for epoch in range(3):
        samples = list(chain.from_iterable(batches[6 * epoch : 6 * epoch + 6]))
        assert [sample.position for sample in samples] == list(range(48))
        assert {sample.epoch for sample in samples} == {epoch}
        assert len({sample.index for sample in samples} & {*range(50)}) == 48


def test_order_depends_on_seed_and_epoch_alone():
    assert list(stream()) == list(stream())
    keys = [(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({stream(seed=s).permutation(epoch).tobytes() for s, epoch in keys}) == 4


def test_repeated_augmentation():
    """Each image three times in a row, at places of its own; an epoch keeps its length."""
    batches = stream(repeats=3, batch_size=12)
    assert batches.steps_per_epoch == 4
    epoch = list(chain.from_iterable(islice(batches, 4)))
    copies = [sample.index for sample in epoch[::3]]
    assert [sample.index for sample in epoch] == [index for index in copies for _ in range(3)]
    assert len(set(copies)) == 16
    assert len({sample.position for sample in epoch}) == 48


@pytest.mark.parametrize(
    ("epoch", "step"), [(0, 0), (0, 4), (1, 0), (1, 5), (1, 6), (2, 3), (3, 0), (7, 0)]
)
def test_start_anywhere(epoch, step):
    rest = stream(start_epoch=epoch, start_step=step)
    assert list(rest) == list(stream())[6 * epoch + step :]
    assert len(rest) == max(0, 18 - 6 * epoch - step)


def test_what_cannot_be():
    with pytest.raises(UserError, match="step 7 of an epoch of 6 steps"):
        stream(start_step=7)
    with pytest.raises(UserError, match=r"50 images.* batch of 64 \(32 on each of 2 .* most 25"):
        stream(batch_size=32, world_size=2)
    assert stream(batch_size=25, world_size=2).steps_per_epoch == 1


def test_sample_seeds_are_distinct():
    keys = [(s, e, p) for s in (0, 1) for e in range(3) for p in range(100)]
    seeds = [seed for key in keys for seed in sample_seeds(*key)]
    assert len(set(seeds)) == 2 * 3 * 100 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()  # noqa: NPY002


def test_generators_are_seeded_and_restored():
    draws = []
    for seed in (2**63 - 1, 2**62, 1):
        seed_everything(seed)
        draws.append(draw())
        with preserve_generators():
            seed_everything(2**63 - 1)
            assert draw() == draws[0]
        after = draw()
        seed_everything(seed)
        assert [draw(), draw()] == [draws[-1], after]
    assert all(len(set(of_one)) == 3 for of_one in zip(*draws, strict=True))
