"""Learning rate and weight decay as functions of the number of optimizer updates.

    schedule = build_scheduler(optimizer, args, updates_per_epoch=1251)
    optimizer.step(); updates += 1
    schedule.step_update(updates)           # after each update
    schedule.step(epoch, metric)            # after each evaluation, for `plateau`

All but `plateau` are pure functions of the number of updates, so a resumed run is exact by
construction. What `plateau` has seen is in the state dict.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch.optim import Optimizer

from deit.errors import UserError


def cosine(start: float, end: float, done: float) -> float:
    """From `start` to `end` by half a cosine, of which the share `done` is over."""
    return end + (start - end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


class PlateauScheduler(Scheduler):
    """Multiply the learning rate by `--decay-rate` when the metric (larger is better) stagnates.

    The reduction comes when more than `--patience-epochs` calls of `step` in a row brought no new
    best. The `--cooldown-epochs` calls after it do not count, nor do those during the warm-up.
    timm's own of that name counts in epochs and loses its counters in a checkpoint.
    """

    def __init__(
        self, optimizer: Optimizer, args: Namespace, warmup_updates: float, **noise: Any
    ) -> None:
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False, **noise)
        self.args = args
        self.warmup_updates = warmup_updates
        self.updates = 0
        self.factor = 1.0
        self.best = -math.inf
        self.bad = 0
        self.waiting = 0

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup_updates:
            start, done = self.args.warmup_lr, t / self.warmup_updates
            return [start + done * (base - start) for base in self.base_values]
        # A base below the minimum stays as it is.
        low = self.args.min_lr
        return [max(base * self.factor, min(base, low)) for base in self.base_values]

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        self.updates = num_updates
        super().step_update(num_updates, metric)

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Take note of an evaluation; `epoch` is timm's interface and has no meaning here."""
        if metric is None or self.updates < self.warmup_updates:
            return
        if metric > self.best:
            self.best, self.bad = metric, 0
        else:
            self.bad += 1
        if self.waiting > 0:
            self.waiting -= 1
            self.bad = 0
        if self.bad > self.args.patience_epochs:
            self.factor *= self.args.decay_rate
            self.waiting, self.bad = self.args.cooldown_epochs, 0
        super().step_update(self.updates)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("factor", "best", "bad", "waiting")}


class ConvNeXtScheduler(Scheduler):
    """The course of the published ConvNeXt runs, which looks its values up in a table.

    The warm-up is a line from 0 that reaches the learning rate in its last update, and not one
    after it. The cosine fills the updates that are left, and starts with the learning rate again.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_updates: int, total_updates: int, lr_min: float
    ) -> None:
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False)
        self.warmup_updates = warmup_updates
        self.total_updates = total_updates
        self.lr_min = lr_min

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup_updates:
            done = t / max(self.warmup_updates - 1, 1)
            return [base * done for base in self.base_values]
        done = (t - self.warmup_updates) / (self.total_updates - self.warmup_updates)
        return [cosine(base, self.lr_min, done) for base in self.base_values]


class TrainingSchedule:
    """Sets `lr` and, where it changes, `weight_decay` of an optimizer's parameter groups.

    Args:
        lr_scheduler: a timm scheduler that counts updates.
        weight_decay: its start, its end, and the updates that the cosine between them takes;
            None if it is constant. Groups are given it times their `wd_scale`.
        late_epochs: None, or the updates of an epoch for the course of the published DeiT runs:
            the scheduler then counts epochs, and is told of each after its end, so that the first
            two have the same learning rate.
    """

    def __init__(
        self,
        lr_scheduler: Scheduler,
        weight_decay: tuple[float, float, int] | None = None,
        late_epochs: int | None = None,
    ) -> None:
        self.optimizer = lr_scheduler.optimizer
        self.lr_scheduler = lr_scheduler
        self.weight_decay = weight_decay
        self.late_epochs = late_epochs
        self.updates = 0
        self.step_update(0)

    def step_update(self, num_updates: int) -> None:
        """Set the values for the update that follows the first `num_updates`."""
        self.updates = num_updates
        late = self.late_epochs
        self.lr_scheduler.step_update(
            num_updates if late is None else max(num_updates // late - 1, 0)
        )
        if self.weight_decay is not None:
            start, end, total = self.weight_decay
            value = cosine(start, end, num_updates / total)
            for group in self.optimizer.param_groups:
                group["weight_decay"] = value * group.get("wd_scale", 1.0)

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Report the accuracy after an epoch; only `plateau` reacts."""
        self.lr_scheduler.step(epoch, metric)  # others count updates and do nothing

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: the updates done, and what a `plateau` schedule has seen."""
        state: dict[str, Any] = {"updates": self.updates}
        if isinstance(self.lr_scheduler, PlateauScheduler):
            state["plateau"] = self.lr_scheduler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go on from `state`. Load the optimizer first: its groups are set here.

        The course itself is that of the present options, so that a run may be resumed with more
        epochs. A state that another program has written (published ones count epochs) is passed
        over; `step_update` with the number of updates then does the same.

        Returns:
            False if what a `plateau` schedule had seen is lost.
        """
        plateau = isinstance(self.lr_scheduler, PlateauScheduler)
        if "updates" not in state:
            return not plateau
        if plateau:
            self.lr_scheduler.load_state_dict(state.get("plateau", {}))
        self.step_update(state["updates"])
        return not plateau or "plateau" in state


def build_scheduler(
    optimizer: Optimizer, args: Namespace, updates_per_epoch: int
) -> TrainingSchedule:
    """The schedule that the command line's options ask for.

    The optimizer's present learning rates are the ones after the warm-up. Training takes
    `args.epochs` * `updates_per_epoch` updates, the warm-up included.

    Args:
        updates_per_epoch: optimizer updates, not steps: gradients may be accumulated over steps.

    Raises:
        UserError: there is no such published course, or nothing is left after the warm-up.
    """
    total, published = args.epochs * updates_per_epoch, args.sched_as_published
    warmup_epochs, course_epochs = args.warmup_epochs, args.epochs
    if args.warmup_steps is not None and args.warmup_steps > 0:
        warmup_epochs = args.warmup_steps / updates_per_epoch
    if published == "convnext" and args.sched != "cosine":
        raise UserError(f"--sched-as-published convnext is a cosine, not --sched {args.sched}")
    if published == "deit" and args.sched == "plateau":
        raise UserError("--sched-as-published deit is for courses by epochs, not --sched plateau")
    if args.warmup_prefix or published == "convnext":
        course_epochs -= warmup_epochs
    if course_epochs <= 0:
        raise UserError(f"a warm-up of {warmup_epochs:g} epochs leaves none of the {args.epochs}")

    if published == "convnext":
        warmup_updates = round(warmup_epochs * updates_per_epoch)
        scheduler: Scheduler = ConvNeXtScheduler(optimizer, warmup_updates, total, args.min_lr)
    elif args.sched == "plateau":
        span = [share * total for share in args.lr_noise] if args.lr_noise else None
        scheduler = PlateauScheduler(
            optimizer,
            args,
            warmup_updates=warmup_epochs * updates_per_epoch,
            noise_range_t=span[0] if span and len(span) == 1 else span,
            noise_pct=args.lr_noise_pct,
            noise_std=args.lr_noise_std,
            noise_seed=args.seed,
        )
    else:
        options = scheduler_kwargs(args) | {
            "num_epochs": course_epochs,
            "warmup_epochs": warmup_epochs,
            "step_on_epochs": False,
            "updates_per_epoch": 1 if published == "deit" else updates_per_epoch,
        }
        scheduler, _ = create_scheduler_v2(optimizer, **options)
    decay = None
    if args.weight_decay_end is not None:
        decay = (args.weight_decay, args.weight_decay_end, total)
    return TrainingSchedule(scheduler, decay, updates_per_epoch if published == "deit" else None)
