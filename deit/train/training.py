"""Everything that a training needs, built from the command line and, when resuming, from the
checkpoint that it goes on from."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.optim import Optimizer

from deit.data import (
    DeviceLoader,
    ImageDataset,
    ResumableBatchSampler,
    build_eval_loader,
    build_mixup,
    build_train_loader,
    check_same_classes,
    match_classes,
    names_of_outputs,
    read_class_map,
)
from deit.errors import UserError
from deit.train.args import config_dict
from deit.train.build import (
    build_train_dataset,
    build_val_dataset,
    mean_and_std,
    number_of_classes,
)
from deit.train.checkpoint import Checkpoint
from deit.train.distributed import DistContext
from deit.train.engine import Precision, TrainStep, needs_second_order
from deit.train.folder import read_log
from deit.train.loading import NETWORK, adopt, find_checkpoints
from deit.train.losses import build_criterion
from deit.train.networks import ModelBundle, build_networks
from deit.train.optim import build_optimizer, scaled_lr
from deit.train.reporting import Reporter, environment
from deit.train.resume import Progress, RunningLoss, TrainingState, seed_all
from deit.train.run import LAST, Run, open_writer
from deit.train.schedule import build_scheduler
from deit.train.stopping import StopAgreement
from deit.train.teacher import build_teacher

# Repeated augmentation uses each image so often in an epoch.
REPEATS = 3


def peak_lr(args: Namespace, images: int) -> float:
    """The learning rate after the warm-up, for updates of so many images."""
    return args.lr if args.unscale_lr else scaled_lr(args.lr, images)


def build_state(
    args: Namespace, networks: ModelBundle, processes: DistContext, updates: int, images: int
) -> TrainingState:
    """Optimizer, schedule and the rest of what changes, at the start of a training."""
    optimizer = build_optimizer(networks.model, args, peak_lr(args, images))
    check_second_order(optimizer, args, processes)
    return TrainingState(
        model=networks.model,
        optimizer=optimizer,
        schedule=build_scheduler(optimizer, args, updates),
        precision=Precision.choose(processes.device, args.use_amp, args.amp_dtype),
        processes=processes,
        args=args,
        running=RunningLoss.on(processes.device),
        ema=None if networks.ema is None else networks.ema.module,
        progress=Progress(epoch=args.start_epoch),
    )


def check_second_order(optimizer: Optimizer, args: Namespace, processes: DistContext) -> None:
    """Raise `UserError` where the gradients cannot be differentiated, as this optimizer does."""
    if needs_second_order(optimizer) and (args.compile or processes.world_size > 1):
        what = "--compile" if args.compile else "several processes"
        raise UserError(
            f"--opt {args.opt} needs second derivatives, which {what} cannot give: "
            f"{'omit it' if args.compile else 'use one process'}, or use another optimizer"
        )


def build_train_step(
    args: Namespace, networks: ModelBundle, state: TrainingState, classes: int
) -> TrainStep:
    """What turns batches into updates."""
    device = state.processes.device
    teacher, mixup = None, build_mixup(args, classes)
    if args.distillation_type != "none":
        with state.processes.main_first():
            teacher = build_teacher(args, classes, device, state.class_names)
    criterion = build_criterion(args, mixup=mixup is not None, teacher=teacher)
    return TrainStep(
        model=networks.wrapped,
        criterion=criterion.to(device),
        optimizer=state.optimizer,
        schedule=state.schedule.step_update,
        precision=state.precision,
        mixup=mixup,
        ema=networks.ema,
        grad_accum_steps=args.update_freq,
        clip_grad=args.clip_grad,
        train_mode=args.train_mode,
    )


def build_train_stream(
    args: Namespace, dataset: ImageDataset, processes: DistContext, progress: Progress
) -> DeviceLoader:
    """The batches of this process, from where `progress` stands to the end of the training."""
    mean, std = mean_and_std(args)
    sampler = ResumableBatchSampler(
        len(dataset),
        batch_size=args.batch_size,
        epochs=args.epochs,
        start_epoch=progress.epoch,
        start_step=progress.step * args.update_freq,
        seed=args.seed,
        world_size=processes.world_size,
        rank=processes.rank,
        repeats=REPEATS if args.repeated_aug else 1,
    )
    return build_train_loader(
        dataset,
        sampler,
        num_workers=workers(args),
        pin_memory=args.pin_mem,
        device=processes.device,
        mean=mean,
        std=std,
        re_prob=0.0 if args.ThreeAugment else args.reprob,  # as published
        re_mode=args.remode,
        re_count=args.recount,
        resplit=args.resplit,
    )


def build_val_loader(
    args: Namespace, dataset: ImageDataset, processes: DistContext
) -> DeviceLoader:
    """The validation batches of this process; all of them without --dist-eval."""
    mean, std = mean_and_std(args)
    return build_eval_loader(
        dataset,
        batch_size=args.batch_size,
        world_size=processes.world_size if args.dist_eval else 1,
        rank=processes.rank if args.dist_eval else 0,
        num_workers=workers(args),
        pin_memory=args.pin_mem,
        device=processes.device,
        mean=mean,
        std=std,
    )


def workers(args: Namespace) -> int:
    """`--num-workers`, but no more than the cores of this process: they would only wait."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux; not what others share the machine
    return min(args.num_workers, len(affinity(0)) if affinity else os.cpu_count() or 1)


def updates_per_epoch(args: Namespace, images: int, processes: int) -> int:
    """Optimizer updates in an epoch of `images`. UserError if they do not fill one batch."""
    updates = images // (args.batch_size * processes) // args.update_freq
    if updates == 0:
        batch = args.batch_size * processes * args.update_freq
        raise UserError(
            f"the training set has {images} images, fewer than one global batch of {batch} "
            f"(--batch-size {args.batch_size} x {processes} processes x "
            f"--update-freq {args.update_freq}): use a smaller one"
        )
    return updates


def build_run(args: Namespace, processes: DistContext) -> Run:
    """Everything, at the start or where the checkpoint that `--resume` names was saved."""
    checkpoint, origin = find_checkpoints(args, processes)
    train_set, val_set, notes = _build_data(args, checkpoint, origin)
    classes = number_of_classes(args, train_set)
    networks = build_networks(args, classes, processes, checkpoint, origin, train_set.class_names)
    networks.notes[:0] = notes
    networks.notes += [data.note for data in (train_set, val_set) if data and data.note]
    if args.ThreeAugment and args.reprob > 0:
        networks.notes.append(f"--ThreeAugment has no erasing: --reprob {args.reprob:g} is ignored")
    updates = updates_per_epoch(args, len(train_set), processes.world_size)
    batch = args.batch_size * processes.world_size
    images = batch * args.update_freq
    state = build_state(args, networks, processes, updates, images)
    state.class_names = train_set.class_names
    train_step = build_train_step(args, networks, state, classes)
    # Building has drawn random numbers; from here on every rank has its own.
    seed_all(args.seed + processes.rank)
    if checkpoint is not None:
        networks.notes += state.load_state_dict(checkpoint, global_batch=images)
    state.schedule.step_update(state.progress.epoch * updates + state.progress.step)
    writer = open_writer(args, processes, fresh=checkpoint is None)
    evaluated = {"": state.ema if args.model_ema_eval is True and state.ema else state.model}
    if args.model_ema_eval == "both":
        evaluated["_ema"] = state.ema
    source = "" if checkpoint is None else checkpoint.source
    run = Run(
        args=args,
        processes=processes,
        train_step=train_step,
        state=state,
        evaluated=evaluated,
        train_loader=build_train_stream(args, train_set, processes, state.progress),
        val_loader=None if val_set is None else build_val_loader(args, val_set, processes),
        batches=len(train_set) // batch,
        updates=updates,
        images=images,
        parameters=networks.parameters,
        agreement=StopAgreement(processes.control),
        reporter=build_reporter(args, networks, state, updates, images, source),
        writer=writer,
    )
    _introduce(run, networks, source, (len(train_set), len(val_set or ()), classes))
    return run


def _build_data(
    args: Namespace, checkpoint: Checkpoint | None, origin: Checkpoint | None
) -> tuple[ImageDataset, ImageDataset | None, list[str]]:
    """Training and test images, with what `args` take on from a checkpoint; remarks."""
    notes = []
    if checkpoint is not None:  # all its outputs are needed
        notes = adopt(args, checkpoint, (*NETWORK, "nb_classes"))
    elif origin is not None:  # the data decide
        notes = adopt(args, origin, NETWORK)
    train_set = build_train_dataset(args)
    val_set = None if args.disable_eval else build_val_dataset(args)
    if val_set is None:
        return train_set, None, notes + _label(args, [train_set], checkpoint)
    check_same_classes(train_set, val_set)
    return train_set, val_set, notes + _label(args, [train_set, val_set], checkpoint)


def _label(
    args: Namespace, data: Sequence[ImageDataset], checkpoint: Checkpoint | None
) -> list[str]:
    """Number the classes as --class-map says, or as the training did that goes on."""
    classes = data[0].class_names
    if args.class_map:
        names, origin = read_class_map(args.class_map), f"--class-map {args.class_map}"
    elif checkpoint is None:
        return []
    else:
        names, origin = checkpoint.class_names, checkpoint.source
        if not names and (args.nb_classes or 0) > len(classes):
            try:
                names, origin = names_of_outputs(classes, args.nb_classes, source=origin)
            except UserError:
                return [
                    f"{origin} does not say which output is which class: taken in the data's order"
                ]
    if not names:
        return []
    outputs = len(names) if args.nb_classes is None else args.nb_classes
    return [match_classes(each, names, outputs, origin=origin) for each in data][-1]


def build_reporter(
    args: Namespace,
    networks: ModelBundle,
    state: TrainingState,
    updates: int,
    images: int,
    source: str,
) -> Reporter:
    """The reporter, with the run's configuration written and its log where `state` stands."""
    processes, progress = state.processes, state.progress
    if source and not progress.history and args.output_dir:
        # A published checkpoint brings no log: keep what the folder's knows of the epochs before.
        log = read_log(Path(args.output_dir))
        progress.history = [record for record in log if record["epoch"] < progress.epoch]
    config = {
        "args": config_dict(args),
        "environment": environment(processes.device, processes.world_size),
        "trainable_parameters": networks.parameters,
        "precision": str(state.precision),
        "global_batch": images,
        "updates_per_epoch": updates,
        "peak_learning_rate": peak_lr(args, images),
        "resumed_from": source or None,
    }
    done = progress.epoch * updates + progress.step
    reporter = Reporter(args, processes, updates=updates, images=images, config=config, done=done)
    reporter.restore(progress.history)
    return reporter


def _introduce(run: Run, networks: ModelBundle, source: str, sizes: tuple[int, int, int]) -> None:
    """Tell in a few lines what is about to happen."""
    args, processes, progress = run.args, run.processes, run.state.progress
    say = run.reporter.say
    train, val, classes = sizes
    device = f"{processes.device} ({torch.get_num_threads()} threads)"
    if processes.device.type == "cuda":
        device = torch.cuda.get_device_name(processes.device)
    say(
        f"model   {args.model}, {networks.parameters / 1e6:.2f} M trainable parameters, "
        f"{args.input_size} x {args.input_size} pixels, {classes} classes"
    )
    say(
        f"data    {args.data_set} {args.data_path}".rstrip()
        + f", {train:,} training and {val:,} test images"
    )
    say(
        f"run     {processes.world_size} x {device}, {run.state.precision}; "
        f"global batch {run.images}, {run.updates} updates an epoch, {args.epochs} epochs; "
        f"{args.opt}, peak learning rate {peak_lr(args, run.images):.3g}"
    )
    say(f"output  {args.output_dir or 'none: nothing is saved without --output-dir'}")
    if workers(args) < args.num_workers:
        say(f"note    {workers(args)} loading processes, as many as this process has cores")
    if args.compile:
        say("note    --compile: the first steps of training and testing take minutes")
    for note in networks.notes:
        say(f"note    {note}")
    if source:
        place = f"epoch {progress.epoch + 1}, step {progress.step}"
        say(
            f"resume  {source}: going on at {place}"
            if progress.epoch < args.epochs
            else f"resume  {source}: all {args.epochs} epochs are done"
        )
    elif args.resume:
        say(f"resume  there is no {LAST} in {args.output_dir} yet: starting afresh")
