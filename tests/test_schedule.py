"""Learning rates and weight decay by the number of updates, and their resumption."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

from deit.errors import UserError
from deit.train.args import parse_args
from deit.train.schedule import build_scheduler

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
    return build_scheduler(optimizer, args, UPDATES)


def course(updates=TOTAL + 5, **settings):
    """The learning rate of each update, first group."""
    optimizer = make_optimizer()
    schedule = make(optimizer, **settings)
    rates = []
    for n in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(rates[-1] / 2), "lr_scale is 0.5"
        schedule.step_update(n + 1)
    return rates


def cosine(t, total, low):
    return low + (BASE - low) * (1 + math.cos(math.pi * t / total)) / 2


def test_cosine_per_update_with_the_published_warm_up():
    rates = course(sched="cosine", min_lr=1e-3, warmup_epochs=2, warmup_lr=1e-2)
    for t in range(2 * UPDATES):
        assert rates[t] == pytest.approx(1e-2 + (BASE - 1e-2) * t / (2 * UPDATES))
    for t in range(2 * UPDATES, TOTAL):
        assert rates[t] == pytest.approx(cosine(t, TOTAL, 1e-3))
    assert rates[TOTAL:] == [1e-3] * 5


def test_cosine_that_starts_after_the_warm_up():
    rates = course(sched="cosine", min_lr=1e-6, warmup_epochs=2, warmup_prefix=True)
    assert rates[0] == 0
    assert rates[2 * UPDATES] == pytest.approx(BASE), "the whole learning rate is reached"
    for t in range(2 * UPDATES, TOTAL):
        assert rates[t] == pytest.approx(cosine(t - 2 * UPDATES, TOTAL - 2 * UPDATES, 1e-6))


def test_published_deit_course_is_an_epoch_late():
    """The scheduler is told of an epoch after its end, by timm's formula in epochs."""
    settings = {"warmup_epochs": 3, "warmup_lr": 1e-3, "min_lr": 1e-2}
    rates = course(sched="cosine", sched_as_published="deit", **settings)
    for t in range(TOTAL):
        epoch = max(t // UPDATES - 1, 0)
        if epoch < 3:
            expected = 1e-3 + epoch * (BASE - 1e-3) / 3
        else:
            expected = cosine(epoch, EPOCHS, 1e-2)
        assert rates[t] == pytest.approx(expected)
    assert rates[: 2 * UPDATES] == [1e-3] * (2 * UPDATES)
    stepped = course(sched="step", sched_as_published="deit", decay_epochs=2)
    assert stepped[:TOTAL] == pytest.approx(
        [BASE * 0.1 ** (max(t // UPDATES - 1, 0) // 2) for t in range(TOTAL)]
    )


@pytest.mark.parametrize("warmup", [0, 2, 0.05])
def test_published_convnext_course_is_a_table(warmup):
    """Its warm-up is numpy's linspace from 0, ends included; the cosine takes the rest."""
    settings = {"warmup_epochs": warmup, "warmup_lr": 1e-3, "min_lr": 1e-2}
    rates = course(sched="cosine", sched_as_published="convnext", **settings)
    start = round(warmup * UPDATES)
    after = range(TOTAL - start)
    table = [*np.linspace(0, BASE, start)] if start else []
    table += [1e-2 + 0.5 * (BASE - 1e-2) * (1 + math.cos(math.pi * i / len(after))) for i in after]
    assert rates[:TOTAL] == pytest.approx(table)
    assert rates[TOTAL:] == pytest.approx([1e-2] * 5), "no second cosine"


def test_step_constant_tanh_and_poly():
    rates = course(sched="step", decay_epochs=2.5, decay_rate=0.1)
    assert rates == pytest.approx([BASE * 0.1 ** (t // 50) for t in range(TOTAL + 5)])
    assert course(sched="constant") == [BASE] * (TOTAL + 5)
    rates = course(sched="poly", decay_rate=2.0, min_lr=0.1)
    assert rates[TOTAL // 2] == pytest.approx(0.1 + (BASE - 0.1) * 0.25)
    rates = course(sched="tanh", min_lr=0.1)
    assert rates[0] > rates[TOTAL // 2] > rates[TOTAL - 1] > 0.1
    assert rates[TOTAL] == 0.1


def test_noise_where_asked_for_and_the_same_every_time():
    settings = {"sched": "cosine", "lr_noise": [0.25, 0.5], "lr_noise_pct": 0.1, "seed": 3}
    rates, quiet = course(**settings), course(sched="cosine")
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
    schedule.step(0, 99.0)  # during the warm-up: does not count
    rates = []
    metrics = [50, 60, 60, float("nan"), 0, 0, 0, 0, 61, 61, 60, 0, 0, 0]
    for epoch, metric in enumerate(metrics, start=1):
        schedule.step_update(epoch * UPDATES)
        schedule.step(epoch, metric)
        rates.append(optimizer.param_groups[0]["lr"] / BASE)
    # Two without a best: reduced; two of cooldown, and two again; the last one meets min_lr.
    low = 0.09 / BASE
    assert rates == pytest.approx(
        [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, low, low, low]
    )


def rates_of_a_run(settings, metrics, stop_at=None):
    """Learning rates of every update; with `stop_at` all objects are built anew there."""
    optimizer = make_optimizer()
    schedule = make(optimizer, **settings)
    rates = []
    for n in range(1, TOTAL + 1):
        rates.append([group["lr"] for group in optimizer.param_groups])
        schedule.step_update(n)
        if n % UPDATES == 0:
            schedule.step(n // UPDATES, metrics[n // UPDATES])
        if n == stop_at:
            saved = optimizer.state_dict(), schedule.state_dict()
            optimizer = make_optimizer()
            schedule = make(optimizer, **settings)
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
    return rates


@pytest.mark.parametrize("stop_at", [7, 73, 100, 161])
@pytest.mark.parametrize(
    "settings",
    [
        PLATEAU,
        {"sched": "cosine", "warmup_epochs": 2, "lr_noise": [0.1, 0.9]},
        {"sched": "cosine", "warmup_epochs": 2, "sched_as_published": "convnext"},
    ],
    ids=["plateau", "cosine", "convnext"],
)
def test_resuming_changes_nothing(settings, stop_at):
    metrics = [0, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3]
    whole = rates_of_a_run(settings, metrics)
    assert len({rate[0] for rate in whole}) > 20
    assert rates_of_a_run(settings, metrics, stop_at) == whole


def test_a_published_state_is_passed_over():
    """It counts epochs: taken over as it is, it would stop the learning rate from changing."""
    optimizer = make_optimizer()
    schedule = make(optimizer, sched="cosine")
    published = {"t_in_epochs": True, "base_values": [9.0, 9.0], "t_initial": 300}
    assert schedule.load_state_dict(published)
    schedule.step_update(TOTAL // 2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(BASE / 2)


def test_what_plateau_had_seen_is_lost_with_a_published_state():
    schedule = make(make_optimizer(), **PLATEAU)
    assert not schedule.load_state_dict({"best": 70.0, "last_epoch": 3})
    assert schedule.load_state_dict(make(make_optimizer(), **PLATEAU).state_dict())


def test_a_warm_up_in_updates():
    settings = {"min_lr": 1e-3, "warmup_lr": 1e-2}
    for steps, epochs in ((30, 1.5), (0, 2), (-1, 2)):
        rates = course(warmup_steps=steps, warmup_epochs=2, **settings)
        assert rates == course(warmup_epochs=epochs, **settings)


def test_wrong_settings():
    with pytest.raises(UserError, match=r"--sched.*'cosin'.*cosine"):
        parse_args(["--sched", "cosin"])
    with pytest.raises(UserError, match="convnext is a cosine, not --sched step"):
        course(sched="step", sched_as_published="convnext")
    with pytest.raises(UserError, match="not --sched plateau"):
        course(sched="plateau", sched_as_published="deit")
    with pytest.raises(UserError, match="warm-up of 10 epochs leaves none of the 10"):
        course(warmup_epochs=10, warmup_prefix=True)
