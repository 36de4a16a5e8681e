"""Learning rate and weight decay as functions of the number of optimizer updates.

    schedule = build_scheduler(optimizer, args, updates_per_epoch=1251)
    optimizer.step(); updates += 1
    schedule.step_update(updates)           # after each update
    schedule.step(epoch, metric)            # after each evaluation, for `plateau`

All but `plateau` are pure functions of the number of updates, so a resumed run is exact by
construction; what `plateau` has seen is in the state dict.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from deit.errors import UserError


class PlateauScheduler(Scheduler):
    """Multiply the learning rate by `decay_rate` when the metric (larger is better) stagnates.

    The reduction comes when more than `patience` calls of `step` in a row brought no new best;
    the `cooldown` calls after it do not count, nor do those during the warm-up. timm's own of
    that name counts in epochs and loses its counters in a checkpoint.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        decay_rate: float,
        patience: int,
        cooldown: int,
        lr_min: float,
        warmup_updates: float,
        warmup_lr: float,
        **noise: Any,
    ) -> None:
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False, **noise)
        self.decay_rate = decay_rate
        self.patience = patience
        self.cooldown = cooldown
        self.lr_min = lr_min
        self.warmup_updates = warmup_updates
        self.warmup_lr = warmup_lr
        self.updates = 0
        self.factor = 1.0
        self.best = -math.inf
        self.bad = 0
        self.waiting = 0

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup_updates:
            done = t / self.warmup_updates
            return [self.warmup_lr + done * (base - self.warmup_lr) for base in self.base_values]
        # A base below the minimum stays as it is.
        return [max(base * self.factor, min(base, self.lr_min)) for base in self.base_values]

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
        if self.bad > self.patience:
            self.factor *= self.decay_rate
            self.waiting, self.bad = self.cooldown, 0
        super().step_update(self.updates)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("factor", "best", "bad", "waiting")}


class ConvNeXtScheduler(Scheduler):
    """The course of the published ConvNeXt runs, which looks its values up in a table.

    The warm-up is a line from 0 that reaches the learning rate in its last update, and not one
    after it; the cosine fills the updates that are left, and starts with the learning rate again.
    """

    def __init__(
        self, optimizer: Optimizer, *, warmup_updates: int, total_updates: int, lr_min: float
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
        factor = (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return [self.lr_min + (base - self.lr_min) * factor for base in self.base_values]


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
            done = min(num_updates / total, 1.0)
            value = end + (start - end) * (1 + math.cos(math.pi * done)) / 2
            for group in self.optimizer.param_groups:
                group["weight_decay"] = value * group.get("wd_scale", 1.0)

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Report the accuracy after an epoch; only `plateau` reacts."""
        if isinstance(self.lr_scheduler, PlateauScheduler):
            self.lr_scheduler.step(epoch, metric)

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
    """The schedule that the options `args` ask for; see the help of the command line.

    The optimizer's present learning rates are the ones after the warm-up. Training takes
    `epochs` * `updates_per_epoch` updates, the warm-up included. Without `warmup_prefix` the
    course starts with the training and the warm-up hides its beginning (the published script's
    way, timm's default); with it the course starts where the warm-up ends and fills the rest.

    Args:
        updates_per_epoch: optimizer updates, not steps: gradients may be accumulated over steps.

    Raises:
        UserError: a `sched` that has no such published course, or no update to make.
    """
    late, table = args.sched_as_published == "deit", args.sched_as_published == "convnext"
    if updates_per_epoch < 1:
        raise UserError(
            f"an epoch has {updates_per_epoch} updates: the data do not fill one global batch; "
            "use a smaller --batch-size or --update-freq"
        )
    if table and args.sched != "cosine":
        raise UserError(f"--sched-as-published convnext is a cosine, not --sched {args.sched}")
    if late and args.sched == "plateau":
        raise UserError("--sched-as-published deit is for courses by epochs, not --sched plateau")
    warmup, updates = args.warmup_epochs, args.epochs * updates_per_epoch
    if (args.warmup_steps or 0) > 0:
        warmup = args.warmup_steps / updates_per_epoch
    prefix = args.warmup_prefix or table
    course_epochs = args.epochs - warmup if prefix else args.epochs
    if course_epochs <= 0:
        raise UserError(f"a warm-up of {warmup:g} epochs leaves none of the {args.epochs}")
    noise = {
        "noise_pct": args.lr_noise_pct,
        "noise_std": args.lr_noise_std,
        "noise_seed": args.seed,  # it depends on this and on the number of the update alone
    }
    if table:
        scheduler: Scheduler = ConvNeXtScheduler(
            optimizer,
            warmup_updates=round(warmup * updates_per_epoch),
            total_updates=updates,
            lr_min=args.min_lr,
        )
    elif args.sched == "plateau":
        span = [x * updates for x in args.lr_noise] if args.lr_noise else None
        scheduler = PlateauScheduler(
            optimizer,
            decay_rate=args.decay_rate,
            patience=args.patience_epochs,
            cooldown=args.cooldown_epochs,
            lr_min=args.min_lr,
            warmup_updates=warmup * updates_per_epoch,
            warmup_lr=args.warmup_lr,
            noise_range_t=span[0] if span and len(span) == 1 else span,
            **noise,
        )
    else:
        constant = args.sched == "constant"  # a step that divides by 1
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched="step" if constant else args.sched,
            num_epochs=course_epochs,
            decay_epochs=args.decay_epochs,
            decay_rate=1.0 if constant else args.decay_rate,
            min_lr=args.min_lr,
            warmup_lr=args.warmup_lr,
            warmup_epochs=warmup,
            warmup_prefix=prefix,
            noise=list(args.lr_noise) if args.lr_noise else None,
            step_on_epochs=False,
            updates_per_epoch=1 if late else updates_per_epoch,
            **noise,
        )
    ends = None
    if args.weight_decay_end is not None:
        ends = (args.weight_decay, args.weight_decay_end, updates)
    return TrainingSchedule(scheduler, ends, updates_per_epoch if late else None)
