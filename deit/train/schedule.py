"""Learning rate and weight decay as functions of the number of optimizer updates.

    schedule = TrainingSchedule(optimizer, args, updates_per_epoch=1251)
    optimizer.step(); updates += 1
    schedule.step_update(updates)           # after each update
    schedule.step(metric)                   # after each evaluation, for `plateau`

All but `plateau` are pure functions of the number of updates, so a resumed run is exact by
construction. What `plateau` has seen is in the state dict.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch.optim import Optimizer

from deit.errors import UserError


def cosine(start: float, end: float, done: float) -> float:
    """From `start` to `end` by half a cosine, of which the share `done` is over."""
    return end + (start - end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


class Course(Scheduler):
    """A course of our own, of the update and a group's full learning rate, as timm's scheduler."""

    def __init__(
        self, optimizer: Optimizer, course: Callable[[int, float], float], **noise: Any
    ) -> None:
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False, **noise)
        self.course = course

    def _get_lr(self, t: int) -> list[float]:
        return [self.course(t, base) for base in self.base_values]


@dataclass
class Plateau:
    """What `--sched plateau` has seen, and the factor on the learning rate that came of it.

    timm's scheduler of that name counts in epochs and loses its counters in a checkpoint.
    """

    factor: float = 1.0
    best: float = -math.inf
    bad: int = 0
    """Evaluations in a row without a new best."""
    waiting: int = 0
    """Evaluations to come that do not count, after a reduction."""

    def note(self, metric: float, args: Namespace) -> None:
        """Take in the metric (larger is better) of an evaluation."""
        self.bad = 0 if metric > self.best or self.waiting > 0 else self.bad + 1
        self.best = max(self.best, metric)
        self.waiting = max(self.waiting - 1, 0)
        if self.bad > args.patience_epochs:
            self.factor *= args.decay_rate
            self.waiting, self.bad = args.cooldown_epochs, 0


class TrainingSchedule:
    """Sets `lr` and, where it changes, `weight_decay` of an optimizer's parameter groups.

    The optimizer's present learning rates are the ones after the warm-up. Training takes
    `args.epochs` * `updates_per_epoch` updates, the warm-up included. Groups have the weight decay
    times their `wd_scale`.

    Args:
        updates_per_epoch: optimizer updates, not steps: gradients may be accumulated over steps.

    Raises:
        UserError: there is no such published course, or nothing is left after the warm-up.
    """

    def __init__(self, optimizer: Optimizer, args: Namespace, updates_per_epoch: int) -> None:
        self.optimizer, self.args, self.updates = optimizer, args, 0
        self.total = args.epochs * updates_per_epoch
        warmup_epochs = args.warmup_epochs
        if args.warmup_steps is not None and args.warmup_steps > 0:
            warmup_epochs = args.warmup_steps / updates_per_epoch
        self.warmup = warmup_epochs * updates_per_epoch
        # The published DeiT runs told their scheduler of each epoch after its end, so that the
        # first two have the same learning rate.
        self.late_epochs = updates_per_epoch if args.sched_as_published == "deit" else None
        self.plateau = Plateau() if args.sched == "plateau" else None
        self.lr_scheduler = self._build(warmup_epochs, updates_per_epoch)
        self.step_update(0)

    def _build(self, warmup_epochs: float, updates_per_epoch: int) -> Scheduler:
        args, published, course_epochs = self.args, self.args.sched_as_published, self.args.epochs
        if published == "convnext" and args.sched != "cosine":
            raise UserError(f"--sched-as-published convnext is a cosine, not --sched {args.sched}")
        if published == "deit" and args.sched == "plateau":
            raise UserError(
                "--sched-as-published deit is for courses by epochs, not --sched plateau"
            )
        if args.warmup_prefix or published == "convnext":
            course_epochs -= warmup_epochs
        if course_epochs <= 0:
            raise UserError(
                f"a warm-up of {warmup_epochs:g} epochs leaves none of the {args.epochs}"
            )
        if published == "convnext":
            self.warmup = round(self.warmup)
            return Course(self.optimizer, self._convnext)
        options = scheduler_kwargs(args)
        if self.plateau is not None:
            noise = {f"noise_{name}": options[f"noise_{name}"] for name in ("pct", "std", "seed")}
            span = [share * self.total for share in args.lr_noise or ()]
            noise["noise_range_t"] = span[0] if len(span) == 1 else span or None
            return Course(self.optimizer, self._plateau, **noise)
        options |= {
            "num_epochs": course_epochs,
            "warmup_epochs": warmup_epochs,
            "step_on_epochs": False,
            "updates_per_epoch": 1 if self.late_epochs else updates_per_epoch,
        }
        return create_scheduler_v2(self.optimizer, **options)[0]

    def _convnext(self, t: int, base: float) -> float:
        """The course of the published ConvNeXt runs, which look its values up in a table.

        The warm-up is a line from 0 that reaches the learning rate in its last update, and not one
        after it. The cosine fills the updates that are left, and starts with that rate again.
        """
        if t < self.warmup:
            return base * (t / max(self.warmup - 1, 1))
        return cosine(base, self.args.min_lr, (t - self.warmup) / (self.total - self.warmup))

    def _plateau(self, t: int, base: float) -> float:
        if t < self.warmup:
            return self.args.warmup_lr + t / self.warmup * (base - self.args.warmup_lr)
        # A base below the minimum stays as it is.
        return max(base * self.plateau.factor, min(base, self.args.min_lr))

    def step_update(self, num_updates: int) -> None:
        """Set the values for the update that follows the first `num_updates`."""
        self.updates = num_updates
        late = self.late_epochs
        self.lr_scheduler.step_update(max(num_updates // late - 1, 0) if late else num_updates)
        if self.args.weight_decay_end is not None:
            start, end = self.args.weight_decay, self.args.weight_decay_end
            value = cosine(start, end, num_updates / self.total)
            for group in self.optimizer.param_groups:
                group["weight_decay"] = value * group.get("wd_scale", 1.0)

    def step(self, metric: float | None) -> None:
        """Report the accuracy after an epoch, if there is one; only `plateau` reacts."""
        if self.plateau is not None and metric is not None and self.updates >= self.warmup:
            self.plateau.note(metric, self.args)
            self.step_update(self.updates)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: the updates done, and what a `plateau` schedule has seen."""
        seen = {} if self.plateau is None else {"plateau": asdict(self.plateau)}
        return {"updates": self.updates} | seen

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go on from `state`. Load the optimizer first: its groups are set here.

        The course itself is that of the present options, so that a run may be resumed with more
        epochs. A state that another program has written (published ones count epochs) is passed
        over; `step_update` with the number of updates then does the same.

        Returns:
            False if what a `plateau` schedule had seen is lost.
        """
        ours = "updates" in state
        if ours:
            if self.plateau is not None:
                self.plateau = Plateau(**state.get("plateau", {}))
            self.step_update(state["updates"])
        return self.plateau is None or (ours and "plateau" in state)
