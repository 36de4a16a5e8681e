"""Learning rates and weight decay by the number of updates, and their resumption."""

import math
from argparse import Namespace

import pytest
import torch
from torch import nn

from deit.errors import UserError
from deit.train.args import parse_args
from deit.train.schedule import TrainingSchedule

EPOCHS, UPDATES = 10, 20
TOTAL = EPOCHS * UPDATES
BASE = 0.4


def make_optimizer():
    groups = [
        {"params": [nn.Parameter(torch.ones(2, 2))], "weight_decay": 0.3, "wd_scale": 1.0},
        {"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.0, "wd_scale": 0.0,
         "lr_scale": 0.5},
    ]  # fmt: skip
    return torch.optim.AdamW(groups, lr=BASE)


def make(optimizer, **settings):
    """The schedule of these options, by default a cosine to 0 without a warm-up."""
    plain = {"epochs": EPOCHS, "warmup_epochs": 0, "warmup_lr": 0.0, "min_lr": 0.0}
    args = Namespace(**(vars(parse_args([])) | plain | settings))
    return TrainingSchedule(optimizer, args, UPDATES)


def course(updates=TOTAL + 5, stop_at=None, **settings):
    """The first group's rate at each update; with `stop_at` all objects are built anew there."""
    metrics = [0, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3]  # of plateau alone
    optimizer = make_optimizer()
    schedule = make(optimizer, **settings)
    rates = []
    for n in range(1, updates + 1):
        rate, other = (group["lr"] for group in optimizer.param_groups)
        rates.append(rate)
        assert other == pytest.approx(rate / 2), "lr_scale is 0.5"
        schedule.step_update(n)
        if n % UPDATES == 0:
            schedule.step(metrics[n // UPDATES])
        if n == stop_at:
            saved = optimizer.state_dict(), schedule.state_dict()
            optimizer = make_optimizer()
            schedule = make(optimizer, **settings)
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
    return rates


def cosine(t, total, low):
    return low + (BASE - low) * (1 + math.cos(math.pi * min(t / total, 1))) / 2


def rise(t, total, low):
    return low + (BASE - low) * t / total


def late(t):
    """The published DeiT scheduler is told of an epoch after its end."""
    return max(t // UPDATES - 1, 0)


START = 2 * UPDATES
WARM_UP = {"warmup_epochs": 2, "warmup_lr": 1e-2, "min_lr": 1e-3}
STEPS = {"sched": "step", "decay_epochs": 2}
COURSES = [
    (WARM_UP, lambda t: rise(t, START, 1e-2) if t < START else cosine(t, TOTAL, 1e-3)),
    (WARM_UP | {"warmup_steps": -1},
     lambda t: rise(t, START, 1e-2) if t < START else cosine(t, TOTAL, 1e-3)),
    (WARM_UP | {"warmup_steps": 30},
     lambda t: rise(t, 30, 1e-2) if t < 30 else cosine(t, TOTAL, 1e-3)),
    (WARM_UP | {"warmup_prefix": True},
     lambda t: rise(t, START, 1e-2) if t < START else cosine(t - START, TOTAL - START, 1e-3)),
    (WARM_UP | {"sched_as_published": "deit"},
     lambda t: rise(late(t), 2, 1e-2) if late(t) < 2 else cosine(late(t), EPOCHS, 1e-3)),
    # The published ConvNeXts' warm-up is numpy's linspace from 0, ends included.
    (WARM_UP | {"sched_as_published": "convnext"},
     lambda t: rise(t, START - 1, 0) if t < START else cosine(t - START, TOTAL - START, 1e-3)),
    ({"sched_as_published": "convnext", "warmup_epochs": 0.05, "min_lr": 1e-2},
     lambda t: 0 if t < 1 else cosine(t - 1, TOTAL - 1, 1e-2)),
    ({"sched_as_published": "convnext", "min_lr": 1e-2}, lambda t: cosine(t, TOTAL, 1e-2)),
    (STEPS | {"sched_as_published": "deit"}, lambda t: BASE * 0.1 ** (late(t) // 2)),
    (STEPS | {"decay_epochs": 2.5}, lambda t: BASE * 0.1 ** (t // 50)),
    ({"sched": "constant"}, lambda t: BASE),
    ({"sched": "poly", "decay_rate": 2.0, "min_lr": 0.1},
     lambda t: 0.1 + (BASE - 0.1) * max(1 - t / TOTAL, 0) ** 2),
    ({"sched": "tanh", "min_lr": 0.1},
     lambda t: 0.1 + (BASE - 0.1) * (1 - math.tanh(10 * t / TOTAL - 7)) / 2 * (t < TOTAL)),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "expected"), COURSES)
def test_course(settings, expected):
    assert course(**settings) == pytest.approx([expected(t) for t in range(TOTAL + 5)])


def test_noise_where_asked_for_and_the_same_every_time():
    settings = {"lr_noise": [0.25, 0.5], "lr_noise_pct": 0.1, "seed": 3}
    rates, quiet = course(**settings), course()
    noisy = [t for t in range(TOTAL) if rates[t] != quiet[t]]
    assert noisy == list(range(TOTAL // 4, TOTAL // 2))
    assert max(abs(rates[t] / quiet[t] - 1) for t in noisy) < 0.1
    assert rates == course(**settings)
    assert rates != course(**(settings | {"seed": 4}))
    only_start = course(**(settings | {"lr_noise": [0.75]}))
    assert next(t for t in range(TOTAL) if only_start[t] != quiet[t]) == 150


def test_weight_decay_goes_to_its_end_by_a_cosine():
    optimizer = make_optimizer()
    schedule = make(optimizer, weight_decay=0.3, weight_decay_end=0.1)
    for updates, expected in ((0, 0.3), (TOTAL // 2, 0.2), (TOTAL, 0.1), (TOTAL + 5, 0.1)):
        schedule.step_update(updates)
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(expected)
        assert optimizer.param_groups[1]["weight_decay"] == 0, "this group does not decay"
    make(optimizer := make_optimizer()).step_update(TOTAL)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3, "constant unless an end is given"


PLATEAU = {
    "sched": "plateau", "decay_rate": 0.5, "patience_epochs": 1, "cooldown_epochs": 2,
    "min_lr": 0.09, "warmup_epochs": 1, "warmup_lr": 0.0, "lr_noise": [0.8], "lr_noise_pct": 0.01,
}  # fmt: skip


def test_plateau():
    optimizer = make_optimizer()
    schedule = make(optimizer, **(PLATEAU | {"lr_noise": None}))
    assert optimizer.param_groups[0]["lr"] == 0
    schedule.step_update(UPDATES // 2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(BASE / 2)
    schedule.step(99.0)  # during the warm-up: does not count
    rates = []
    metrics = [50, 60, 60, float("nan"), 0, 0, 0, 0, 61, 61, 60, 0, 0, 0]
    for epoch, metric in enumerate(metrics, start=1):
        schedule.step_update(epoch * UPDATES)
        schedule.step(metric)
        rates.append(optimizer.param_groups[0]["lr"] / BASE)
    # Two without a best: reduced; two of cooldown, and two again; the last one meets min_lr.
    low = 0.09 / BASE
    assert rates == pytest.approx(
        [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, low, low, low]
    )


@pytest.mark.parametrize("stop_at", [7, 73, 100, 161])
@pytest.mark.parametrize(
    "settings",
    [
        PLATEAU,
        {"warmup_epochs": 2, "lr_noise": [0.1, 0.9]},
        {"warmup_epochs": 2, "sched_as_published": "convnext"},
    ],
    ids=["plateau", "cosine", "convnext"],
)
def test_resuming_changes_nothing(settings, stop_at):
    whole = course(**settings, updates=TOTAL)
    assert len(set(whole)) > 20
    assert course(**settings, updates=TOTAL, stop_at=stop_at) == whole


def test_a_published_state_is_passed_over():
    """It counts epochs: taken over as it is, it would stop the learning rate from changing."""
    optimizer = make_optimizer()
    schedule = make(optimizer)
    assert schedule.load_state_dict({"t_in_epochs": True, "base_values": [9.0], "t_initial": 300})
    schedule.step_update(TOTAL // 2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(BASE / 2)
    plateau = make(make_optimizer(), **PLATEAU)
    assert not plateau.load_state_dict({"best": 70.0, "last_epoch": 3}), "what it had seen is lost"
    assert plateau.load_state_dict(make(make_optimizer(), **PLATEAU).state_dict())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sched": "step", "sched_as_published": "convnext"}, "convnext is a cosine, not --sched"),
        ({"sched": "plateau", "sched_as_published": "deit"}, "not --sched plateau"),
        ({"warmup_epochs": 10, "warmup_prefix": True}, "of 10 epochs leaves none of the 10"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(UserError, match=words):
        course(**settings)
