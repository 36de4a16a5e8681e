"""A training run: what it learns and from which data, put together, its place and its folder."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from deit.cli import duration
from deit.data import ImageDataset, check_same_classes
from deit.saving import CheckpointWriter, SaveError, clean_temporaries
from deit.train.args import config_dict
from deit.train.build import (
    build_mixup,
    build_model,
    build_train_dataset,
    build_train_stream,
    build_val_dataset,
    build_val_loader,
    label,
    number_of_classes,
    updates_per_epoch,
    workers,
)
from deit.train.checkpoint import Checkpoint
from deit.train.compilation import compile_network
from deit.train.distributed import DistContext, shard, wrap_ddp
from deit.train.ema import ModelEma
from deit.train.engine import Precision, Progress, TrainingState, count_parameters
from deit.train.folder import LAST, clear, read_log
from deit.train.loading import NETWORK, adopt, find_checkpoints
from deit.train.losses import build_criterion, prepare_student
from deit.train.optim import build_optimizer, freeze_shift, peak_lr
from deit.train.reporting import Reporter, environment
from deit.train.resume import load_state_dict, seed_all, state_dict
from deit.train.schedule import TrainingSchedule
from deit.train.stopping import StopAgreement
from deit.train.teacher import build_teacher
from deit.train.weights import freeze_all_but_attention, load_weights


class Run:
    """A training run that is ready to start, or to go on where `--resume` says.

    Attributes:
        evaluated: what is evaluated: as "" the averaged network or the trained one, as "_ema" the
            averaged one beside it, if both are.
        val_loader: None with --disable-eval.
        batches: in an epoch; those that do not fill an update at its end are not used.
        updates: optimizer updates in an epoch.
        images: in an update, over all processes.
        parameters: trainable ones.
        writer: what saves checkpoints; None without an output folder, and on other ranks than 0.
    """

    def __init__(self, args: Namespace, processes: DistContext) -> None:
        self.args, self.processes = args, processes
        checkpoint, origin = find_checkpoints(args, processes)
        self.source = "" if checkpoint is None else checkpoint.source
        train_set, val_set, notes = _build_data(args, checkpoint, origin)
        classes = number_of_classes(args, train_set)
        self.updates = updates_per_epoch(args, len(train_set), processes.world_size)
        batch = args.batch_size * processes.world_size
        self.batches, self.images = len(train_set) // batch, batch * args.update_freq
        self.state, remarks = start_training(
            args,
            processes,
            classes,
            updates=self.updates,
            images=self.images,
            checkpoint=checkpoint,
            origin=origin,
            class_names=train_set.class_names,
        )
        self.parameters = count_parameters(self.state.model)
        model, ema = self.state.model, self.state.ema
        self.evaluated = {"": model}
        if ema is not None and args.model_ema_eval:
            both = args.model_ema_eval == "both"
            self.evaluated = {"": model, "_ema": ema.module} if both else {"": ema.module}
        self.writer: CheckpointWriter | None = None
        if args.output_dir and processes.is_main:
            clean_temporaries(Path(args.output_dir))
            if checkpoint is None:
                clear(Path(args.output_dir))
            self.writer = CheckpointWriter(Path(args.output_dir))
        epoch, step = self.state.progress.epoch, self.state.progress.step
        self.train_loader = build_train_stream(args, train_set, processes, epoch, step)
        self.val_loader = None if val_set is None else build_val_loader(args, val_set, processes)
        self.agreement = StopAgreement(processes.control)
        if checkpoint is not None and not self.state.progress.history and args.output_dir:
            # A published checkpoint brings no log: keep what the folder's knows.
            log = read_log(Path(args.output_dir))
            self.state.progress.history = [record for record in log if record["epoch"] < epoch]
        config = {
            "args": config_dict(args),
            "environment": environment(processes.device, processes.world_size),
            "trainable_parameters": self.parameters,
            "precision": str(self.state.precision),
            "global_batch": self.images,
            "updates_per_epoch": self.updates,
            "peak_learning_rate": peak_lr(args, self.images),
            "resumed_from": self.source or None,
        }
        self.reporter = Reporter(args, processes, config, self.state.progress)
        self._introduce(len(train_set), len(val_set or ()), classes, notes + remarks)

    def _introduce(self, train: int, val: int, classes: int, notes: Sequence[str]) -> None:
        """Tell in a few lines what is about to happen, on how many images of how many classes."""
        args, processes, progress = self.args, self.processes, self.state.progress
        device = f"{processes.device} ({torch.get_num_threads()} threads)"
        if processes.device.type == "cuda":
            device = torch.cuda.get_device_name(processes.device)
        lines = [
            f"model   {args.model}, {self.parameters / 1e6:.2f} M trainable parameters, "
            f"{args.input_size} x {args.input_size} pixels, {classes} classes",
            f"data    {f'{args.data_set} {args.data_path}'.rstrip()}, {train:,} training and "
            f"{val:,} test images",
            f"run     {processes.world_size} x {device}, {self.state.precision}; "
            f"global batch {self.images}, {self.updates} updates an epoch, {args.epochs} epochs; "
            f"{args.opt}, peak learning rate {peak_lr(args, self.images):.3g}",
            f"output  {args.output_dir or 'none: nothing is saved without --output-dir'}",
        ]
        if workers(args) < args.num_workers:
            lines.append(
                f"note    {workers(args)} loading processes, as many as this process has cores"
            )
        if args.compile:
            lines.append("note    --compile: the first steps of training and testing take minutes")
        lines += [f"note    {note}" for note in notes]
        if self.source:
            going_on = f"going on at epoch {progress.epoch + 1}, step {progress.step}"
            over = progress.epoch >= args.epochs
            done = f"all {args.epochs} epochs are done"
            lines.append(f"resume  {self.source}: {done if over else going_on}")
        elif args.resume:
            lines.append(f"resume  there is no {LAST} in {args.output_dir} yet: starting afresh")
        for line in lines:
            self.reporter.say(line)

    def note_update(self, done: int, loss: float | None) -> None:
        """After each update of an epoch: remember the place, and show it."""
        progress = self.state.progress
        progress.step, progress.images = done, done * self.images
        if self.writer is not None:
            self.writer.check()
        self.reporter.on_update(self.learning_rate(), loss)

    def learning_rate(self) -> float:
        """That of the layers without reduction."""
        return max(group["lr"] for group in self.state.optimizer.param_groups)

    def save(self, names: list[str]) -> None:
        """Save the state under `names` in the output folder, if there is one."""
        if self.args.output_dir and self.args.save_ckpt:
            checkpoint = state_dict(self.state)
            if self.writer is not None:
                self.writer.save(checkpoint, names)
                self._drop_copies(names)

    def _drop_copies(self, coming: list[str]) -> None:
        """Keep the last `--save-ckpt-num` of the epochs' copies; `coming` are being written."""
        folder, kept = Path(self.args.output_dir), self.args.save_ckpt_num
        present = {path.name for path in folder.iterdir()} | {*coming}
        copies = [name for name in present if re.fullmatch(r"checkpoint_\d{4,}\.pth", name)]
        copies.sort(key=lambda name: int(name[11:-4]))
        for name in copies[:-kept] if kept else ():
            (folder / name).unlink(missing_ok=True)

    def last_state(self) -> str:
        """In words, where the training can go on from after a failure, once all is written."""
        if not self.args.output_dir:
            return "nothing is saved, as there is no --output-dir"
        if self.writer is not None:
            with suppress(SaveError):  # it left the state before
                self.writer.flush()
        path = Path(self.args.output_dir) / LAST
        if not path.exists():
            return "no state has been saved yet"
        return f"the last state is {path}, --resume auto goes on from it"

    def report_end(self, how: str) -> None:
        """Say `how` the training ended, its best results, and where its files are."""
        args, progress = self.args, self.state.progress
        curves = self.reporter.close()
        best = ""
        if progress.best_epoch >= 0:
            best = f"; best Acc@1 {progress.best_acc1:.3f} in epoch {progress.best_epoch + 1}"
        if progress.best_ema_epoch >= 0:
            accuracy, epoch = progress.best_ema_acc1, progress.best_ema_epoch + 1
            best += f", of the average {accuracy:.3f} in {epoch}"
        spent = sum(record.get("time", 0.0) for record in progress.history) + progress.seconds
        self.reporter.say(f"{how}, {duration(spent)} of training{best}")
        if args.output_dir and args.save_ckpt:
            again = "" if how == "finished" else "; --resume auto goes on from there"
            self.reporter.say(f"saved   {Path(args.output_dir) / LAST}{again}")
        if curves is not None:
            self.reporter.say(f"curves  {curves}")

    def close(self) -> None:
        """End the loader's workers and wait for the last write; also after a failure."""
        for part in (self.train_loader, self.val_loader, self.writer):
            if part is not None:
                part.close()


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
    if val_set is not None:
        check_same_classes(train_set, val_set)
    sets = [data for data in (train_set, val_set) if data is not None]
    notes += label(args, sets, checkpoint, args.nb_classes, strict=False)
    notes += [data.note for data in sets if data.note]
    if args.ThreeAugment and args.reprob > 0:
        notes.append(f"--ThreeAugment has no erasing: --reprob {args.reprob:g} is ignored")
    return train_set, val_set, notes


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
    model.to(device)
    networks, ema = [model], None
    if args.model_ema:
        ema = ModelEma(model, args.model_ema_decay, on_host=args.model_ema_force_cpu)
        networks.append(ema.module)
        if checkpoint is not None and checkpoint.has_average:
            load_weights(ema.module, checkpoint, ema=True)
        elif checkpoint is not None:
            notes.append(f"{checkpoint.source} has no average, it starts as a copy of the weights")
    precision = Precision.choose(device, args.use_amp, args.amp_dtype)
    wrapped = _compile_and_spread(networks, args, processes, precision.dtype)
    optimizer, remarks = build_optimizer(model, args, peak_lr(args, images))
    notes += remarks
    mixup, teacher = build_mixup(args, classes), None
    if args.distillation_type != "none":
        with processes.main_first():
            teacher = build_teacher(args, classes, device, class_names)
    criterion = build_criterion(args, mixup=mixup is not None, teacher=teacher)
    state = TrainingState(
        args,
        processes,
        model,
        wrapped,
        criterion.to(device),
        optimizer,
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


def _compile_and_spread(
    networks: Sequence[nn.Module],
    args: Namespace,
    processes: DistContext,
    dtype: torch.dtype | None,
) -> nn.Module:
    """Compile and shard all in place, as asked for; returns the first, in DDP if needed."""
    sharded = args.fsdp and processes.world_size > 1
    for network in networks if args.compile else ():
        # what is sharded are blocks, which gather their weights before each call
        compile_network(network, args.compile_mode, blocks=args.compile_blocks or sharded)
    if not sharded:
        return wrap_ddp(networks[0], processes)
    for network in networks:
        shard(network, processes, dtype)
    return networks[0]
