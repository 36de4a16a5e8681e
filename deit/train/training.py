"""What learns: a network with its average, optimizer, schedule and loss, from its first weights or
from where a checkpoint was saved."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import torch
from torch import nn

from deit.data import build_mixup
from deit.train.build import build_model
from deit.train.checkpoint import Checkpoint
from deit.train.compilation import compile_network
from deit.train.distributed import DistContext, shard, wrap_ddp
from deit.train.ema import ModelEma
from deit.train.engine import Precision, Progress, TrainingState
from deit.train.losses import TrainingLoss, build_criterion, prepare_student
from deit.train.optim import build_optimizer, freeze_shift, peak_lr
from deit.train.resume import load_state_dict, seed_all
from deit.train.schedule import TrainingSchedule
from deit.train.teacher import build_teacher
from deit.train.weights import freeze_all_but_attention, load_weights


def start_training(
    args: Namespace,
    processes: DistContext,
    classes: int,
    *,
    updates: int,
    images: int,
    checkpoint: Checkpoint | None = None,
    origin: Checkpoint | None = None,
    class_names: Sequence[str] = (),
) -> tuple[TrainingState, list[str]]:
    """Build all that an update needs and changes.

    The order matters, and so do the random numbers drawn on the way. The average copies what is
    neither compiled nor sharded, and weights are loaded whole, before they are sharded.

    Args:
        classes: outputs of the network.
        updates: in an epoch.
        images: in an update, over all processes.
        checkpoint: that the training goes on from.
        origin: the one that --finetune names.
        class_names: of the data; a classifier for others is not taken from `origin`.

    Returns:
        What makes updates and is changed by them, and remarks for the user.
    """
    device = processes.device
    seed_all(args.seed)  # the same weights on every rank
    model, notes = build_model(args, classes)
    notes += _first_weights(model, args, checkpoint, origin, class_names)
    model.to(device)
    ema = None
    if args.model_ema:
        ema = ModelEma(model, args.model_ema_decay, on_host=args.model_ema_force_cpu)
        if checkpoint is not None and checkpoint.has_average:
            load_weights(ema.module, checkpoint, ema=True)
        elif checkpoint is not None:
            notes.append(f"{checkpoint.source} has no average, it starts as a copy of the weights")
    average = None if ema is None else ema.module
    precision = Precision.choose(device, args.use_amp, args.amp_dtype)
    wrapped = _compile_and_spread(model, average, args, processes, precision.dtype)
    optimizer, remarks = build_optimizer(model, args, peak_lr(args, images))
    notes += remarks
    mixup = build_mixup(args, classes)
    state = TrainingState(
        args,
        processes,
        model,
        wrapped,
        criterion=_criterion(args, processes, classes, class_names, mixup is not None),
        optimizer=optimizer,
        schedule=TrainingSchedule(optimizer, args, updates),
        precision=precision,
        progress=Progress(epoch=args.start_epoch),
        mixup=mixup,
        ema=ema,
        class_names=class_names,
    )
    # Building has drawn random numbers; from here on every rank has its own.
    seed_all(args.seed + processes.rank)
    if checkpoint is not None:
        notes += load_state_dict(state, checkpoint, global_batch=images)
    state.schedule.step_update(state.progress.epoch * updates + state.progress.step)
    return state, notes


def _first_weights(
    model: nn.Module,
    args: Namespace,
    checkpoint: Checkpoint | None,
    origin: Checkpoint | None,
    class_names: Sequence[str],
) -> list[str]:
    """Load the weights that there are, and freeze those that stay; remarks for the user."""
    notes = []
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
    return notes


def _compile_and_spread(
    model: nn.Module,
    average: nn.Module | None,
    args: Namespace,
    processes: DistContext,
    dtype: torch.dtype | None,
) -> nn.Module:
    """Compile and shard both in place, as asked for; returns what is trained, in DDP if needed."""
    sharded = args.fsdp and processes.world_size > 1
    networks = [model] if average is None else [model, average]
    for network in networks if args.compile else ():
        # what is sharded are blocks, which gather their weights before each call
        compile_network(network, args.compile_mode, blocks=args.compile_blocks or sharded)
    if not sharded:
        return wrap_ddp(model, processes)
    for network in networks:
        shard(network, processes, dtype)
    return model


def _criterion(
    args: Namespace, processes: DistContext, classes: int, class_names: Sequence[str], mixup: bool
) -> TrainingLoss:
    teacher = None
    if args.distillation_type != "none":
        with processes.main_first():
            teacher = build_teacher(args, classes, processes.device, class_names)
    return build_criterion(args, mixup=mixup, teacher=teacher).to(processes.device)
