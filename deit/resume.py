"""The exact state of a training, to save and to go on from: nothing that a later bit depends on
is missing.

On top of the published checkpoint format (`model`, `model_ema`, `optimizer`, `lr_scheduler`,
`epoch`, `scaler`, `args`) a checkpoint has

    step        optimizer updates done in the epoch after `epoch`; 0 unless stopped in mid-epoch
    class_names the classes that the outputs stand for, in their order
    progress    images seen and time spent in that epoch, best result, the lines of log.txt
    processes   for every rank: the states of all random generators, the running loss

`epoch` is the last completed one, -1 before the first is. All tensors are whole, whatever they
were sharded over, and no key has a prefix, so that checkpoints move between any numbers of
processes, DDP and FSDP, compiled and not.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from deit.args import config_dict
from deit.distributed import Processes, like_sharded
from deit.engine import Precision, RunningLoss
from deit.errors import UserError
from deit.schedule import TrainingSchedule

# What the command line and the device decide about a parameter group. Everything else in it (step
# counts, estimated distances, ...) is state of the optimizer.
_FROM_THIS_RUN = frozenset(
    {"params", "lr", "initial_lr", "lr_scale", "weight_decay", "wd_scale", "betas", "eps"}
    | {"momentum", "max_grad_norm", "foreach", "fused", "capturable", "differentiable"}
)
# Other entries (factors of moments, step counts) have shapes of their own.
_SHAPED_LIKE_WEIGHTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


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
    seconds: float = 0.0
    """Time spent on it, in all sessions together."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """What log.txt holds."""

    def next_epoch(self, record: Mapping[str, Any]) -> None:
        """The epoch under way is over, with `record` as its line in log.txt."""
        self.history.append(dict(record))
        self.epoch, self.step, self.images, self.seconds = self.epoch + 1, 0, 0, 0.0


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators, as safe plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - timm's mixup
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    keys = keys.numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_all(seed: int) -> None:
    """Seed every global generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - timm's mixup draws from the global generator
    torch.manual_seed(seed)


def whole(value: Any, keep: bool) -> Any:
    """`value` with every sharded tensor in it made whole (a collective).

    Args:
        keep: whether this process wants them; the others only take part. Whole tensors go to the
            host one by one, so that no device has to hold all of them.
    """
    if isinstance(value, DTensor):
        gathered = value.detach().full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: whole(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item, keep) for item in value)
    return value


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any], source: str) -> None:
    """Load a whole optimizer state dict into `optimizer`, sharded as its parameters are.

    Raises:
        UserError: it belongs to another optimizer or to other parameters.
    """
    own_groups = optimizer.state_dict()["param_groups"]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    saved_groups = saved["param_groups"]
    sizes = [len(group["params"]) for group in own_groups]
    if [len(group["params"]) for group in saved_groups] != sizes:
        raise UserError(
            f"the optimizer in {source!r} has other parameter groups than this run: use the same "
            "model, --opt, --layer-decay and --weight-decay, or start from it with --finetune"
        )
    order = {index: n for n, index in enumerate(i for g in saved_groups for i in g["params"])}
    state: dict[int, dict[str, Any]] = {}
    for index, values in saved["state"].items():
        param = params[order[index]]
        if any(key in values and values[key].shape != param.shape for key in _SHAPED_LIKE_WEIGHTS):
            raise UserError(
                f"the optimizer state in {source!r} is of tensors of other shapes than this run's: "
                "use the same model and --opt, or start from it with --finetune"
            )
        state[order[index]] = {key: _place(value, param) for key, value in values.items()}
    groups = [
        dict(theirs) | {k: v for k, v in own.items() if k in _FROM_THIS_RUN}
        for own, theirs in zip(own_groups, saved_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _place(value: Any, param: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return like_sharded(value, param) if value.shape == param.shape else value.clone()


@dataclass
class TrainingState:
    """Everything that changes while training, gathered for saving and restoring."""

    model: nn.Module
    """Not wrapped in DDP; possibly sharded or compiled in place."""
    optimizer: Optimizer
    schedule: TrainingSchedule
    precision: Precision
    processes: Processes
    args: argparse.Namespace
    running: RunningLoss
    ema: nn.Module | None = None
    progress: Progress = field(default_factory=Progress)
    class_names: Sequence[str] = ()
    """Of the network's outputs, in their order."""

    def collect(self) -> dict[str, Any]:
        """The checkpoint (a collective; only what rank 0 returns is to be saved)."""
        keep = self.processes.is_main
        own = {
            "random": random_state(self.processes.device),
            "running": self.running.state(),
            "threads": torch.get_num_threads(),
        }
        checkpoint = {
            "model": whole(self.model.state_dict(), keep),
            "optimizer": whole(self.optimizer.state_dict(), keep),
            "lr_scheduler": self.schedule.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "epoch": self.progress.epoch - 1,
            "step": self.progress.step,
            "progress": asdict(self.progress),
            "processes": self.processes.gather(own),
            "args": config_dict(self.args),
            "class_names": list(self.class_names),
        }
        if self.ema is not None:
            checkpoint["model_ema"] = whole(self.ema.state_dict(), keep)
        return checkpoint

    def restore(
        self, checkpoint: Mapping[str, Any], *, source: str, global_batch: int
    ) -> list[str]:
        """Go on from `checkpoint`, whose `model` and `model_ema` have been loaded already.

        Args:
            global_batch: images an update of this run.

        Returns:
            What could not be restored exactly, in sentences for the user; none if all was.
        """
        notes = []
        if isinstance(checkpoint.get("optimizer"), Mapping):
            self._check_optimizer(checkpoint.get("args"), source)
            load_optimizer(self.optimizer, checkpoint["optimizer"], source)
        else:
            notes.append("it has no optimizer state, so the moments start at zero")
        if isinstance(checkpoint.get("lr_scheduler"), Mapping):
            self.schedule.load_state_dict(checkpoint["lr_scheduler"])
        if checkpoint.get("scaler") and self.precision.scaler.is_enabled():
            self.precision.scaler.load_state_dict(checkpoint["scaler"])
        known = {f.name for f in fields(Progress)}
        saved = {k: v for k, v in checkpoint.get("progress", {}).items() if k in known}
        started = self.progress.epoch  # --start-epoch, for a file that does not say
        self.progress = Progress(**saved)
        self.progress.epoch = int(checkpoint.get("epoch", started - 1)) + 1
        self.progress.step = int(checkpoint.get("step", 0))
        if self.progress.step and self.progress.images != self.progress.step * global_batch:
            self.progress.step, rest = divmod(self.progress.images, global_batch)
            self.progress.images -= rest
            notes.append("its global batch was another one, so the rest of the epoch differs")
        notes += self._restore_processes(checkpoint.get("processes"))
        return notes

    def _check_optimizer(self, saved: Any, source: str) -> None:
        """Moments mean something else to another optimizer."""
        theirs, ours = (str(getattr(a, "opt", "")).lower() for a in (saved, self.args))
        lamb = {"lamb", "fusedlamb"}  # one optimizer in two implementations
        if theirs and theirs != ours and {theirs, ours} != lamb:
            raise UserError(
                f"{source!r} was trained with --opt {theirs}, this run has --opt {ours}: use the "
                "same, or start from it with --finetune"
            )

    def _restore_processes(self, saved: list[Mapping[str, Any]] | None) -> list[str]:
        if saved is None:
            return ["it has no states of random generators, so they start from --seed"]
        world_size, rank = self.processes.world_size, self.processes.rank
        if len(saved) == world_size:
            self.running.load(saved[rank]["running"])
            set_random_state(saved[rank]["random"], self.processes.device)
            threads = saved[rank]["threads"]
            if self.processes.device.type == "cpu" and threads != torch.get_num_threads():
                return [
                    f"it was saved with {threads} CPU threads, this run has "
                    f"{torch.get_num_threads()}: sums are rounded differently; --threads {threads}"
                ]
            return []
        # Of the running sums only the total matters; random streams cannot be split or joined.
        for n, state in enumerate(saved):
            if n % world_size == rank:
                self.running.total += state["running"]["total"].to(self.running.total)
                self.running.count += state["running"]["count"].to(self.running.count)
        if rank < len(saved):
            set_random_state(saved[rank]["random"], self.processes.device)
        return [
            f"it was saved by {len(saved)} processes, this run has {world_size}: the same images "
            "in the same order, but dropout, stochastic depth and mixup draw differently"
        ]
