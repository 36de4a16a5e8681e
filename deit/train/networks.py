"""The network of a training in all the forms that it is needed in."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from deit.train.build import build_model
from deit.train.checkpoint import Checkpoint
from deit.train.compilation import compile_network
from deit.train.distributed import DistContext, shard, wrap_ddp
from deit.train.ema import ModelEma
from deit.train.engine import Precision, count_parameters
from deit.train.losses import prepare_student
from deit.train.optim import freeze_shift
from deit.train.resume import seed_all
from deit.train.weights import freeze_all_but_attention, load_weights


@dataclass
class ModelBundle:
    """One network in all the forms that it is needed in."""

    model: nn.Module
    """Itself: on the device, compiled and sharded in place if asked for."""
    wrapped: nn.Module
    """What is trained: `model`, in DDP if there are several processes."""
    ema: ModelEma | None
    parameters: int
    notes: list[str]
    """Remarks for the user."""


def build_networks(
    args: Namespace,
    classes: int,
    processes: DistContext,
    checkpoint: Checkpoint | None,
    origin: Checkpoint | None = None,
    class_names: Sequence[str] = (),
) -> ModelBundle:
    """Build the network, with its first weights, and its average.

    Args:
        checkpoint: that the training goes on from.
        origin: the checkpoint that --finetune names.
        class_names: of the data; a classifier for others is not taken from `origin`.

    The order matters: the average copies what is neither compiled nor sharded, and weights are
    loaded whole, before they are sharded.
    """
    seed_all(args.seed)  # the same weights on every rank
    model, notes = build_model(args, classes)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    elif origin is not None:
        theirs = origin.class_names
        others = bool(theirs and class_names) and theirs != list(class_names)
        report = load_weights(model, origin, adapt=True, new_classes=others)
        notes.append(f"--finetune {origin.source}: {origin.which()}; {report}")
    if args.attn_only:
        freeze_all_but_attention(model)
    if args.freeze_shift and (note := freeze_shift(model)):
        notes.append(note)
    if args.distillation_type != "none":
        prepare_student(model)
    model.to(processes.device)
    parameters = count_parameters(model)
    ema = None
    if args.model_ema:
        ema = ModelEma(model, args.model_ema_decay, on_host=args.model_ema_force_cpu)
        if checkpoint is not None and checkpoint.has_average:
            load_weights(ema.module, checkpoint, ema=True)
        elif checkpoint is not None:
            notes.append(f"{checkpoint.source} has no average, it starts as a copy of the weights")
    spread = args.fsdp and processes.world_size > 1
    if args.compile:
        for network in [model] if ema is None else [model, ema.module]:
            # what is sharded are blocks, which gather their weights before each call
            compile_network(network, args.compile_mode, blocks=args.compile_blocks or spread)
    if not spread:
        return ModelBundle(model, wrap_ddp(model, processes), ema, parameters, notes)
    dtype = Precision.choose(processes.device, args.use_amp, args.amp_dtype).dtype
    if ema is not None:
        shard(ema.module, processes, dtype)
    return ModelBundle(model, shard(model, processes, dtype), ema, parameters, notes)
