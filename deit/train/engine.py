"""One update, one epoch of training, one evaluation."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from deit.errors import UserError
from deit.train.distributed import DistContext
from deit.train.ema import ModelEma
from deit.train.losses import TrainingLoss
from deit.train.metrics import Accuracy, Scores
from deit.train.schedule import TrainingSchedule
from deit.train.stopping import StopAgreement

# Updates between two looks at the loss on a GPU: each look waits for all queued work.
_LOOK_EVERY = 20

Batches = Iterator[tuple[Tensor, Tensor]]


class NonFiniteLossError(UserError):
    """The loss became infinite or NaN at `update` (from 0) of the epoch."""

    def __init__(self, update: int) -> None:
        super().__init__(f"the loss is not finite at step {update}")
        self.update = update


def lower_precision(device: torch.device) -> torch.dtype:
    """What to autocast to on a device: bfloat16, or float16 on GPUs that only emulate that."""
    # Emulated bfloat16, on cards before Ampere, is slower than float32.
    emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if emulated else torch.bfloat16


class Precision:
    """Automatic mixed precision: where to autocast to what, and the scaler that float16 needs.

    Args:
        dtype: the lower precision, None for none (everything in float32).
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device = device
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    @classmethod
    def choose(cls, device: torch.device, use_amp: bool, name: str = "auto") -> Precision:
        """For `--use-amp` and `--amp-dtype` (auto, bfloat16, float16). CPUs compute in float32."""
        if not use_amp or device.type != "cuda":
            return cls(device, None)
        return cls(device, lower_precision(device) if name == "auto" else getattr(torch, name))

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype is not None, cache_enabled=True
        )

    def __str__(self) -> str:
        return "float32" if self.dtype is None else str(self.dtype).removeprefix("torch.")


class RunningLoss:
    """Sums over the images of an epoch on this process; they stay on the device between reports."""

    def __init__(self, device: torch.device) -> None:
        real = torch.float32 if device.type == "mps" else torch.float64
        self.total = torch.zeros((), dtype=real, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        # The first update whose loss was not finite, -1 if there was none.
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, loss: Tensor, images: int, update: int) -> None:
        """Take in the mean loss () over a batch, which belongs to number `update` of the epoch."""
        loss = loss.detach()
        self.total += loss * images
        self.count += images
        new = ~torch.isfinite(loss) & (self.first_bad < 0)
        self.first_bad.masked_fill_(new, update)

    def mean(self, processes: DistContext) -> float:
        """The mean loss so far, over all processes; waits for the device.

        Raises:
            NonFiniteLossError: one of them was not finite.
        """
        own = (self.total.item(), self.count.item(), self.first_bad.item())
        totals, counts, first_bad = zip(*processes.gather(own), strict=True)
        if bad := [number for number in first_bad if number >= 0]:
            raise NonFiniteLossError(min(bad))
        return sum(totals) / max(sum(counts), 1)

    def state(self) -> dict[str, Tensor]:
        return {name: value.cpu().clone() for name, value in vars(self).items()}

    def add_state(self, state: Mapping[str, Tensor]) -> None:
        """Take in the sums that a process had saved."""
        self.total += state["total"].to(self.total)
        self.count += state["count"].to(self.count)
        self.first_bad.clamp_(min=state["first_bad"].to(self.first_bad))


@dataclass
class Progress:
    """How far a training has come."""

    epoch: int = 0
    """The epoch under way, from 0."""
    step: int = 0
    """Updates done in it."""
    images: int = 0
    """Images seen in it by all processes: `step` for another global batch."""
    best_acc1: float = -1.0
    best_epoch: int = -1
    best_ema_acc1: float = -1.0
    """That of the average, where both are evaluated."""
    best_ema_epoch: int = -1
    seconds: float = 0.0
    """Time spent on it, in all sessions together."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """What log.txt holds."""

    def improves(self, acc1: float, kind: str = "") -> bool:
        """Whether `acc1` of this epoch is the best so far, which is remembered.

        Args:
            kind: "_ema" for the average, where both are evaluated.
        """
        if acc1 <= getattr(self, f"best{kind}_acc1"):
            return False
        setattr(self, f"best{kind}_acc1", acc1)
        setattr(self, f"best{kind}_epoch", self.epoch)
        return True

    def next_epoch(self, record: Mapping[str, Any]) -> None:
        """The epoch under way is over, with `record` as its line in log.txt."""
        self.history.append(dict(record))
        self.epoch, self.step, self.images, self.seconds = self.epoch + 1, 0, 0, 0.0


@dataclass
class TrainingState:
    """All that makes an update out of batches, and all that an update changes."""

    args: Namespace
    """Of which `update_freq`, `clip_grad`, `train_mode`, `compile` and `opt` matter here."""
    processes: DistContext
    model: nn.Module
    """Not wrapped in DDP; possibly sharded or compiled in place."""
    wrapped: nn.Module
    """What is trained: `model`, or DDP around it."""
    criterion: TrainingLoss
    optimizer: Optimizer
    schedule: TrainingSchedule
    precision: Precision
    progress: Progress
    mixup: Mixup | None = None
    ema: ModelEma | None = None
    class_names: Sequence[str] = ()
    """Of the network's outputs, in their order."""

    def __post_init__(self) -> None:
        """Raises `UserError` where the optimizer needs second derivatives and there are none."""
        self.running = RunningLoss(self.processes.device)
        # of optimizers that differentiate the gradients they are given, as AdaHessian does
        self._second_order = getattr(self.optimizer, "is_second_order", False)
        if self._second_order and (self.args.compile or self.processes.world_size > 1):
            what = "--compile" if self.args.compile else "several processes"
            raise UserError(
                f"--opt {self.args.opt} needs second derivatives, which {what} cannot give: "
                f"{'omit it' if self.args.compile else 'use one process'}, or use another optimizer"
            )
        if self._second_order:  # `update` drops the gradients that the warning is about
            warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def update(self, batches: Batches, number: int) -> None:
        """One optimizer update from the next `args.update_freq` batches.

        Args:
            number: of the update in its epoch, for the running loss.
        """
        scaler, count = self.precision.scaler, self.args.update_freq
        for micro_step in range(count):
            images, targets = next(batches)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            images = self.criterion.network_input(images)
            # Only the last of the batches reduces the gradients over the processes.
            last = micro_step == count - 1
            if isinstance(self.wrapped, DistributedDataParallel):
                self.wrapped.require_backward_grad_sync = last
            elif isinstance(self.wrapped, FSDPModule):
                self.wrapped.set_requires_gradient_sync(last)
            # Fused attention has no second derivative.
            attention = sdpa_kernel(SDPBackend.MATH) if self._second_order else nullcontext()
            with self.precision.autocast(), attention:
                outputs = self.wrapped(images)
                loss = self.criterion(outputs, targets, images)
            self.running.add(loss, len(targets), number)
            scaler.scale(loss / count).backward(create_graph=self._second_order)
        if self.args.clip_grad is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self.args.clip_grad)
        try:
            scaler.step(self.optimizer)
        except RuntimeError as error:
            if "DTensor" not in str(error):
                raise
            kind = type(self.optimizer).__name__
            raise UserError(
                f"the optimizer {kind} cannot update sharded weights (--fsdp)"
            ) from error
        scaler.update()
        self.optimizer.zero_grad()  # apex's takes no argument
        if self.ema is not None:
            self.ema.update(self.model)


def count_parameters(model: nn.Module) -> int:
    """The number of trainable values; of whole tensors, however they are sharded."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def train_one_epoch(
    state: TrainingState,
    batches: Batches,
    *,
    updates: int,
    agreement: StopAgreement,
    on_update: Callable[[int, float | None], None],
) -> float:
    """Train from where the progress of `state` stands to the end of its epoch.

    Args:
        batches: the running stream of (images (B, 3, H, W), targets (B,)) on the device, which is
            left where the next epoch begins.
        updates: optimizer updates in a whole epoch.
        on_update: called after each update with the number of updates done in the epoch, and,
            where the device was waited for anyway, their mean loss.

    Returns:
        The mean loss over the epoch's images, of all processes.

    Raises:
        NonFiniteLossError: before any state of a later update can be saved.
        Stopped: between two updates, on all processes at the same one.
    """
    processes, done_before = state.processes, state.progress.epoch * updates
    state.wrapped.train(state.args.train_mode)
    state.criterion.train()
    look_every = 1 if processes.device.type == "cpu" else _LOOK_EVERY
    try:
        for number in range(state.progress.step, updates):
            state.update(batches, number)
            done = number + 1
            state.schedule.step_update(done_before + done)
            sync_loss = done % look_every == 0 or done == updates
            on_update(done, state.running.mean(processes) if sync_loss else None)
            agreement.poll()
    finally:
        if state.ema is not None:
            state.ema.flush()
    return state.running.mean(processes)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    args: Namespace,
    *,
    precision: Precision,
    processes: DistContext,
    agreement: StopAgreement | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Top-1, top-5 and cross-entropy over a data set; exact for any number of processes.

    Args:
        model: the network itself, not its DDP wrapper.
        loader: batches of at most `args.batch_size` images, of which ranks may have different
            numbers: with `args.dist_eval` each process has its own part of the data.
        args: with `compile` the last batch is filled up, so that the network sees one shape; with
            `flop_eval` the mirrored images are evaluated too.
        on_batch: called with the numbers of batches done and to do.

    Raises:
        Stopped: between two batches, on all processes at the same one.
    """
    model.eval()
    accuracy = Accuracy(processes.device)
    own = len(loader)
    # All ranks go through the same number of steps: sharded weights are gathered, and stops
    # agreed on, by all of them together.
    steps = max(processes.gather(own))
    batches = iter(loader)
    size = args.batch_size if args.compile else 1
    idle = torch.zeros(size, 3, args.input_size, args.input_size, device=processes.device)
    for step in range(steps):
        if step < own:
            images, targets = next(batches)
            count = len(images)
            if count < size:
                images = torch.cat([images, idle[count:]])
            with precision.autocast():
                logits = model(images)[:count]
                mirrored = model(images.flip(-1))[:count] if args.flop_eval else None
            accuracy.update(logits, targets, mirrored)
        elif isinstance(model, FSDPModule):
            with precision.autocast():
                for _ in range(1 + args.flop_eval):
                    model(idle)
        on_batch(step + 1, steps)
        if agreement is not None:
            agreement.poll()
    return accuracy.compute(distributed=args.dist_eval and processes.world_size > 1)
