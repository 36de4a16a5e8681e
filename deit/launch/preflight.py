"""What can be told before a job starts: in the queue, or in a log, errors are found hours later.

Imports torch, and so is left out where a job is only shown.
"""

from __future__ import annotations

import importlib.util
import os
import re
from argparse import Namespace
from pathlib import Path

import torch

from deit.data import check_same_classes
from deit.errors import UserError
from deit.launch.spec import JobSpec
from deit.train.build import (
    build_model,
    build_train_dataset,
    build_val_dataset,
    check_known,
    number_of_classes,
    train_transform_of,
    updates_per_epoch,
)
from deit.train.distributed import choose_device
from deit.train.folder import LAST
from deit.train.optim import build_optimizer


def check(spec: JobSpec) -> None:
    """Build what the job will build, without its memory, and look at the files it will read.

    Data that are not on this machine may be on the nodes of the cluster: a note says so.

    Raises:
        UserError: as the job would, or a folder that cannot be written.
    """
    classes = _check_data(spec, spec.tasks[0].args)  # the same data for all
    for args in (task.args for task in spec.tasks):
        distils = args.distillation_type != "none"
        if args.overwrite:
            raise UserError(
                "--overwrite would remove the job's own state at its next start: remove the folder "
                "by hand, or choose another --output-dir"
            )
        for folder in (spec.asked.job_dir, args.output_dir):
            _check_writable(folder)
        files = {"--resume": args.resume, "--finetune": args.finetune}
        files |= {"--teacher-path": args.teacher_path} if distils else {}
        for option, source in files.items():
            elsewhere = re.match(r"$|auto$|https?://|hf-hub:|.*%", source)
            if not elsewhere and not Path(source).expanduser().is_file():
                raise UserError(f"{option} {source}: there is no such file")
        check_known(args.model)
        if distils:
            check_known(args.teacher_model, "teacher")
        train_transform_of(args)
        # What the command line does not say of the network stands in a checkpoint.
        if not (args.resume or args.finetune or (Path(spec.asked.job_dir) / LAST).exists()):
            with torch.device("meta"):
                model, _ = build_model(args, classes)
                if not args.eval:
                    build_optimizer(model, args, args.lr)
        if args.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError("--wandb needs the package wandb: pip install wandb")
        if spec.asked.local:
            choose_device(args.device)


def _check_writable(folder: str) -> None:
    """The folder may be new, and have the job's number in its name."""
    path = Path(re.split(r"[^/]*%", folder)[0] or ".").absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        why = "cannot be written" if path.is_dir() else "is not a folder"
        raise UserError(f"the job's folder {folder} cannot be made: {path} {why}")


def _check_data(spec: JobSpec, args: Namespace) -> int:
    """The number of classes, as far as it can be told."""
    unknown, local = args.nb_classes or 1000, spec.asked.local
    absent = [
        p for p in (args.data_path, args.eval_data_path) if p and not Path(p).expanduser().exists()
    ]
    if absent and not local:
        print(f"note    {absent[0]} is not on this machine: the nodes must see it")
    # Otherwise they may be millions of files on a slow file system, or not be there yet.
    if args.download or not (local or args.data_set == "SAMPLE"):
        return unknown
    sets = [] if args.eval else [build_train_dataset(args)]
    if not args.eval:
        updates_per_epoch(args, len(sets[0]), spec.processes)
    if not args.disable_eval:
        sets.append(build_val_dataset(args))
    check_same_classes(sets[0], sets[-1])
    if args.resume or args.finetune:  # the checkpoint says how many outputs there are
        return unknown
    return number_of_classes(args, sets[0])
