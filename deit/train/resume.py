"""The exact state of a training, to save and to go on from: nothing that a later bit depends on
is missing.

On top of the published checkpoint format (`model`, `model_ema`, `optimizer`, `lr_scheduler`,
`epoch`, `scaler`, `args`) a checkpoint has

    step        optimizer updates done in the epoch after `epoch`; 0 unless stopped in mid-epoch
    parameters  the names of the parameters in `optimizer`, in its order
    class_names the classes that the outputs stand for, in their order
    progress    images seen and time spent in that epoch, best result, the lines of log.txt
    processes   for every rank: the states of all random generators, the running loss

`epoch` is the last completed one, -1 before the first is. All tensors are whole, whatever they
were sharded over, and no key has a prefix, so that checkpoints move between any numbers of
processes, DDP and FSDP, compiled and not.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from deit.data.stream import seed_everything
from deit.errors import UserError, some
from deit.train.args import config_dict
from deit.train.checkpoint import Checkpoint, entries_as_expected
from deit.train.engine import Progress, TrainingState
from deit.train.loading import changed_options
from deit.train.moments import (
    decayed_names,
    load_optimizer,
    optimizer_names,
    optimizer_state,
    published_names,
    refusal,
    same_optimizer,
)


def _epoch(checkpoint: Checkpoint, start_epoch: int) -> int:
    """The last epoch that was completed.

    Raises:
        UserError: it is a word, as in the best files of ConvNeXt's authors, and the command line
            does not say it.
    """
    epoch = checkpoint.get("epoch", start_epoch - 1)
    try:
        return int(epoch)
    except (TypeError, ValueError):
        if start_epoch > 0:
            return start_epoch - 1
        raise UserError(
            f"{checkpoint.source!r} does not say which epoch it is of (epoch is {epoch!r}): give "
            "the one to go on with by --start-epoch"
        ) from None


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
    """Seed every global generator, those of devices too."""
    seed_everything(seed)
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


def state_dict(state: TrainingState) -> dict[str, Any]:
    """The checkpoint (a collective; only what rank 0 returns is to be saved)."""
    keep = state.processes.is_main
    own = {
        "random": random_state(state.processes.device),
        "running": state.running.state(),
        "threads": torch.get_num_threads(),
    }
    checkpoint = {
        "model": whole(state.model.state_dict(), keep),
        "optimizer": whole(optimizer_state(state.optimizer), keep),
        "parameters": optimizer_names(state.model, state.optimizer),
        "lr_scheduler": state.schedule.state_dict(),
        "scaler": state.precision.scaler.state_dict(),
        "epoch": state.progress.epoch - 1,
        "step": state.progress.step,
        "progress": asdict(state.progress),
        "processes": state.processes.gather(own),
        "args": config_dict(state.args),
        "class_names": list(state.class_names),
    }
    if state.ema is not None:
        checkpoint["model_ema"] = whole(state.ema.module.state_dict(), keep)
    return checkpoint


@entries_as_expected
def load_state_dict(
    state: TrainingState, checkpoint: Checkpoint, *, global_batch: int
) -> list[str]:
    """Go on from `checkpoint`, whose `model` and `model_ema` have been loaded already.

    Args:
        global_batch: images an update of this run.

    Returns:
        What could not be restored exactly, in sentences for the user; none if all was.
    """
    notes = changed_options(checkpoint, state.args)
    if state.args.resume_weights_only:
        notes.append("--resume-weights-only: the optimizer's moments start at zero")
    elif isinstance(checkpoint.get("optimizer"), Mapping):
        notes += _restore_optimizer(state, checkpoint)
    else:
        notes.append("it has no optimizer state, so the moments start at zero")
    course = checkpoint.get("lr_scheduler")
    if not state.schedule.load_state_dict(course if isinstance(course, Mapping) else {}):
        notes.append("the accuracies that --sched plateau has seen are not in it: it starts anew")
    if state.ema is None and checkpoint.has_average:
        notes.append("its average (model_ema) is dropped, as this run keeps none: --model-ema")
    known = {f.name for f in fields(Progress)}
    saved = {k: v for k, v in checkpoint.get("progress", {}).items() if k in known}
    started = state.progress.epoch  # --start-epoch, for a file that does not say
    state.progress = Progress(**saved)
    state.progress.epoch = _epoch(checkpoint, started) + 1
    state.progress.step = int(checkpoint.get("step", 0))
    if state.progress.step and state.progress.images != state.progress.step * global_batch:
        state.progress.step, rest = divmod(state.progress.images, global_batch)
        state.progress.images -= rest
        notes.append("its global batch was another one, so the rest of the epoch differs")
    notes += _restore_processes(state, checkpoint.get("processes"))
    return notes


def _restore_optimizer(state: TrainingState, checkpoint: Checkpoint) -> list[str]:
    """Load moments and the scaler; remarks on what the run there did otherwise."""
    source, saved = checkpoint.source, checkpoint["optimizer"]
    theirs, ours = (str(o.get("opt", "")).lower() for o in (checkpoint.options, vars(state.args)))
    if theirs and not same_optimizer(theirs, ours):
        raise refusal(source, f"is of --opt {theirs}, this run has --opt {ours}", "one")
    names, published = checkpoint.get("parameters"), "processes" not in checkpoint
    if published:  # our own code has always written `processes`
        names = published_names(state.model, checkpoint["model"], saved, source)
    new = load_optimizer(state.model, state.optimizer, saved, source, names)
    if checkpoint.get("scaler") and state.precision.scaler.is_enabled():
        state.precision.scaler.load_state_dict(checkpoint["scaler"])
    notes = []
    if new:
        others = f" and {len(new) - 1} other parameters" if len(new) > 1 else ""
        notes.append(f"it has no moments of {new[0]}{others}, which start at zero")
    return notes + (_published_differences(state, checkpoint, names) if published else [])


def _published_differences(
    state: TrainingState, checkpoint: Checkpoint, names: list[str]
) -> list[str]:
    """What the published run did otherwise than this one, unless the options ask for it."""
    theirs = decayed_names(names, checkpoint["optimizer"]["param_groups"])
    own = optimizer_names(state.model, state.optimizer)
    ours = decayed_names(own, state.optimizer.param_groups)
    others = [name for name in own if name in theirs and name not in ours]
    notes = []
    if others and ours:
        notes.append(
            f"it was trained with weight decay on {some(others)}: --decay-as-compiled goes on so"
        )
    course = "deit" if "lr_scheduler" in checkpoint else "convnext"
    by_timm = "state_dict" in checkpoint  # whose own script has other courses
    if not by_timm and state.args.sched_as_published != course:
        notes.append(
            "its learning rates were those of the published code: --sched-as-published "
            f"{course} goes on with them"
        )
    return notes


def _restore_processes(state: TrainingState, saved: list[Mapping[str, Any]] | None) -> list[str]:
    if saved is None:
        return ["it has no states of random generators, so they start from --seed"]
    world_size, rank = state.processes.world_size, state.processes.rank
    device = state.processes.device
    # Of the running sums only the total matters; random streams cannot be split or joined.
    for one in saved[rank::world_size]:
        state.running.add_state(one["running"])
    if rank < len(saved):
        set_random_state(saved[rank]["random"], device)
    if len(saved) != world_size:
        return [
            f"it was saved by {len(saved)} processes, this run has {world_size}: the same "
            "images in the same order, but dropout, stochastic depth and mixup draw differently"
        ]
    threads, now = saved[rank]["threads"], torch.get_num_threads()
    if device.type == "cpu" and threads != now:
        return [
            f"it was saved with {threads} CPU threads, this run has {now}: sums are rounded "
            f"differently; --threads {threads}"
        ]
    return []
