"""One epoch of training, one evaluation."""

from __future__ import annotations

import math
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from deit.errors import UserError
from deit.train.distributed import DistContext, unsynchronised
from deit.train.ema import ModelEma
from deit.train.losses import TrainingLoss
from deit.train.metrics import Accuracy, Scores
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


@dataclass
class RunningLoss:
    """Sums over the images of an epoch on this process; they stay on the device between reports."""

    total: Tensor
    count: Tensor
    first_bad: Tensor
    """The first update whose loss was not finite, -1 if there was none."""

    @classmethod
    def on(cls, device: torch.device) -> RunningLoss:
        real = torch.float32 if device.type == "mps" else torch.float64
        return cls(
            torch.zeros((), dtype=real, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            torch.full((), -1, dtype=torch.int64, device=device),
        )

    def add(self, loss: Tensor, images: int, update: int) -> None:
        """Take in the mean loss () over a batch, which belongs to number `update` of the epoch."""
        loss = loss.detach()
        self.total += loss * images
        self.count += images
        new = ~torch.isfinite(loss) & (self.first_bad < 0)
        self.first_bad.masked_fill_(new, update)

    def reduce(self, processes: DistContext) -> tuple[float, int, int | None]:
        """(sum, count, first bad update or None) over all processes; waits for the device."""
        own = (self.total.item(), self.count.item(), self.first_bad.item())
        totals, counts, bad = zip(*processes.gather(own), strict=True)
        return sum(totals), sum(counts), min((n for n in bad if n >= 0), default=None)

    def state(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name).cpu().clone() for f in fields(self)}

    def add_state(self, state: Mapping[str, Tensor]) -> None:
        """Take in the sums that a process had saved."""
        self.total += state["total"].to(self.total)
        self.count += state["count"].to(self.count)
        self.first_bad.clamp_(min=state["first_bad"].to(self.first_bad))

    def reset(self) -> None:
        self.total.zero_()
        self.count.zero_()
        self.first_bad.fill_(-1)


@dataclass
class TrainStep:
    """What makes an update out of batches.

    Attributes:
        model: the network, wrapped in DDP or sharded if there are several processes.
        schedule: called with the number of updates done since the start of the training; sets
            learning rate and weight decay for the next one.
        grad_accum_steps: batches whose gradients one update averages.
        clip_grad: largest global norm of the gradient, None for no clipping.
        train_mode: whether dropout and stochastic depth are on.
    """

    model: nn.Module
    criterion: TrainingLoss
    optimizer: Optimizer
    schedule: Callable[[int], None]
    precision: Precision
    mixup: Mixup | None = None
    ema: ModelEma | None = None
    grad_accum_steps: int = 1
    clip_grad: float | None = None
    train_mode: bool = True

    def __post_init__(self) -> None:
        self._second_order = needs_second_order(self.optimizer)
        if self._second_order:  # `update` drops the gradients that the warning is about
            warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        wrapped = isinstance(self.model, DistributedDataParallel)
        self._bare = self.model.module if wrapped else self.model

    def update(self, batches: Batches, running: RunningLoss, number: int) -> None:
        """One optimizer update from the next `grad_accum_steps` batches.

        Args:
            number: of the update in its epoch, for `running`.
        """
        for micro_step in range(self.grad_accum_steps):
            images, targets = next(batches)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            images = self.criterion.network_input(images)
            with unsynchronised(self.model, last=micro_step == self.grad_accum_steps - 1):
                with self.precision.autocast(), twice_differentiable(self._second_order):
                    outputs = self.model(images)
                    loss = self.criterion(outputs, targets, images)
                running.add(loss, len(targets), number)
                scaled = self.precision.scaler.scale(loss / self.grad_accum_steps)
                scaled.backward(create_graph=self._second_order)
        scaler = self.precision.scaler
        if self.clip_grad is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self.clip_grad)
        try:
            scaler.step(self.optimizer)
        except RuntimeError as error:
            if "DTensor" not in str(error):
                raise
            name = type(self.optimizer).__name__
            raise UserError(
                f"the optimizer {name} cannot update sharded weights (--fsdp)"
            ) from error
        scaler.update()
        self.optimizer.zero_grad()  # apex's takes no argument
        if self.ema is not None:
            self.ema.update(self._bare)


def needs_second_order(optimizer: Optimizer) -> bool:
    """Whether the optimizer differentiates the gradients it is given, as AdaHessian does."""
    return bool(getattr(optimizer, "is_second_order", False))


def twice_differentiable(wanted: bool) -> AbstractContextManager[None]:
    """Compute attention by its formula where fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH) if wanted else nullcontext()


def train_one_epoch(
    train_step: TrainStep,
    batches: Batches,
    *,
    updates: int,
    start: int,
    done_before: int,
    running: RunningLoss,
    processes: DistContext,
    agreement: StopAgreement,
    on_update: Callable[[int, float | None], None],
) -> float:
    """Train from update `start` of an epoch to its end.

    Args:
        batches: the running stream of (images (B, 3, H, W), targets (B,)) on the device, which is
            left where the next epoch begins.
        updates: optimizer updates in a whole epoch.
        done_before: updates in all the epochs before this one.
        running: the loss sums of this epoch so far.
        on_update: called after each update with the number of updates done in the epoch, and,
            where the device was waited for anyway, their mean loss.

    Returns:
        The mean loss over the epoch's images, of all processes.

    Raises:
        NonFiniteLossError: before any state of a later update can be saved.
        Stopped: between two updates, on all processes at the same one.
    """
    train_step.model.train(train_step.train_mode)
    train_step.criterion.train()
    look_every = 1 if processes.device.type == "cpu" else _LOOK_EVERY
    try:
        for number in range(start, updates):
            train_step.update(batches, running, number)
            done = number + 1
            train_step.schedule(done_before + done)
            sync_loss = done % look_every == 0 or done == updates
            on_update(done, mean_loss(running, processes) if sync_loss else None)
            agreement.poll()
    finally:
        if train_step.ema is not None:
            train_step.ema.flush()
    return mean_loss(running, processes)


def mean_loss(running: RunningLoss, processes: DistContext) -> float:
    """The mean loss so far, over all processes.

    Raises:
        NonFiniteLossError: one of them was not finite.
    """
    total, count, bad = running.reduce(processes)
    if bad is not None:
        raise NonFiniteLossError(bad)
    return total / max(count, 1)


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
            numbers.
        args: of these `dist_eval`, with which each process has its own part of the data, and the
            parts are summed; `compile`, with which the last batch is filled up, so that a compiled
            network sees one shape; `flop_eval`, to evaluate the mirrored images too.
        on_batch: called with the numbers of batches done and to do.

    Raises:
        Stopped: between two batches, on all processes at the same one.
    """
    model.eval()
    device = processes.device
    accuracy = Accuracy(device)
    own = len(loader)
    # All ranks go through the same number of steps: sharded weights are gathered, and stops
    # agreed on, by all of them together.
    steps = max(processes.gather(own))
    batches = iter(loader)
    size, padded = args.input_size, args.batch_size if args.compile else 1
    idle = torch.zeros(padded, 3, size, size, device=device)
    for step in range(steps):
        if step < own:
            images, targets = next(batches)
            count = len(images)
            if count < padded:
                images = torch.cat([images, idle[count:]])
            with precision.autocast():
                logits = model(images)[:count]
                mirrored = model(images.flip(-1))[:count] if args.flop_eval else None
            accuracy.update(logits, targets, mirrored)
        elif isinstance(model, FSDPModule):
            with precision.autocast():
                model(idle)
                if args.flop_eval:
                    model(idle)
        on_batch(step + 1, steps)
        if agreement is not None:
            agreement.poll()
    return accuracy.compute(distributed=args.dist_eval and processes.world_size > 1)


def count_parameters(model: nn.Module) -> int:
    """The number of trainable values; of whole tensors, however they are sharded."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def describe(scores: Scores) -> str:
    """The line that evaluations of this family of networks print."""
    text = f"* Acc@1 {scores.acc1:.3f} Acc@5 {scores.acc5:.3f} loss {scores.loss:.3f}"
    if scores.mirrored is not None:
        text += f" mirrored Acc@1 {scores.mirrored:.3f} same answer {scores.same:.3f}"
    return text


def as_log(scores: Scores, suffix: str = "") -> dict[str, Any]:
    """The `test_*` entries of a line of log.txt, with `suffix` at the end of their names."""
    log = {"test_loss": scores.loss, "test_acc1": scores.acc1, "test_acc5": scores.acc5}
    if scores.mirrored is not None:
        log |= {"test_flop_acc1": scores.mirrored, "test_flop_same": scores.same}
    # JSON has no NaN
    return {k + suffix: v if math.isfinite(v) else None for k, v in log.items()}
