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
        assert len({sample.index for sample in samples}) == 48
        assert all(0 <= sample.index < 50 for sample in samples)


def test_order_depends_on_seed_and_epoch_alone():
    assert list(stream()) == list(stream())
    orders = {
        tuple(stream(seed=seed).permutation(epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_global_batch(repeats, world_size):
    whole = list(stream(repeats=repeats))
    parts = [
        list(stream(repeats=repeats, batch_size=8 // world_size, world_size=world_size, rank=rank))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        for rank in range(world_size):
            assert parts[rank][step] == batch[rank::world_size]


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
    ("epoch", "step"), [(0, 0), (0, 4), (1, 0), (1, 5), (1, 6), (2, 3), (3, 0)]
)
def test_start_anywhere(epoch, step):
    rest = stream(start_epoch=epoch, start_step=step)
    assert list(rest) == list(stream())[6 * epoch + step :]
    assert len(rest) == 18 - 6 * epoch - step
    assert len(stream(start_epoch=7)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_step": 7}, "step 7 of an epoch of 6 steps"),
        (
            {"batch_size": 32, "world_size": 2},
            r"50 images.* batch of 64 \(32 on each of 2 .* most 25",
        ),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        stream(**options)
    assert stream(batch_size=25, world_size=2).steps_per_epoch == 1


def test_sample_seeds_are_distinct():
    keys = [(s, e, p) for s in (0, 1) for e in range(3) for p in range(100)]
    seeds = [seed for key in keys for seed in sample_seeds(*key)]
    assert len(set(seeds)) == 2 * 3 * 100 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()  # noqa: NPY002


def test_generators_are_seeded_and_restored():
    before = [draw()]
    seed_everything(2**63 - 1)
    first = draw()
    seed_everything(1)
    with preserve_generators():
        seed_everything(2**63 - 1)
        assert draw() == first
    after = draw()
    seed_everything(1)
    assert draw() == after != before[0]
    seed_everything(2**62)
    assert all(a != b for a, b in zip(draw(), first, strict=True))
