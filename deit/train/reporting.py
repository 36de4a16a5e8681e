"""What a run tells: progress on the terminal, log.txt, TensorBoard, Weights & Biases, curves.

Only rank 0 speaks and writes. Without an output folder nothing is written.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar

from deit.cli import duration
from deit.errors import UserError, drop_output, one_line
from deit.saving import atomic_path, write_text
from deit.train.distributed import DistContext
from deit.train.engine import Progress
from deit.train.folder import BEST, CONFIG_FILE, CURVES_FILE, LAST, LOG_FILE

_WANDB_PROJECT = "mirror-equivariant-vision"
_PANELS = {
    "loss": {"train_loss": "train", "test_loss": "test", "test_loss_ema": "test, average"},
    "accuracy (%)": {
        "test_acc1": "top-1",
        "test_acc5": "top-5",
        "test_acc1_ema": "top-1, average",
        "test_acc5_ema": "top-5, average",
    },
    "learning rate": {"train_lr": None},
}


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Versions, hardware, git commit and command line, for the record of a run."""
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "processes": world_size,
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "platform": platform.platform(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": os.getcwd(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git(*words: str) -> str | None:
    """What a git command says about this source tree; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def memory_used(device: torch.device) -> int:
    """Bytes: the peak of what tensors took on a GPU, else the peak of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Draw loss, accuracy and learning rate over the epochs as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (name, curves) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        for key, label in curves.items():
            points = [(r["epoch"] + 1, r[key]) for r in history if r.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker=".", linewidth=1.2)
        axes.set(xlabel="epoch", title=name)
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


class Reporter:
    """Tells the user and the files how a training goes.

    Args:
        args: of these, where to write and what to log to.
        config: written to config.json. Its `updates_per_epoch` and `global_batch` are used here.
        progress: of the training. Its history is what log.txt holds.

    Raises:
        UserError: `--wandb` without the package, or it cannot start.
    """

    def __init__(
        self,
        args: Namespace,
        processes: DistContext,
        config: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        main = processes.is_main
        self.folder = Path(args.output_dir) if args.output_dir and main else None
        self.console = Console(highlight=False, soft_wrap=True, quiet=not main)
        self._args, self._device, self._progress = args, processes.device, progress
        self._updates, self._images = config["updates_per_epoch"], config["global_batch"]
        self._session_start, self._session_done = time.perf_counter(), 0
        self._bar: ProgressBar | None = None
        self._loss = float("nan")
        self._boards: dict[str, Any] = {}
        if self.folder is not None:
            text = json.dumps(config, indent=2, sort_keys=True, default=str)
            write_text(self.folder / CONFIG_FILE, text + "\n")
            self._write_log()
        if main and (args.output_dir or args.log_dir):
            self._open_tensorboard(args.log_dir or self.folder / "tensorboard")
        if main and args.wandb:
            self._open_wandb(config)

    def _open_tensorboard(self, folder: str | Path) -> None:
        done = self._progress.epoch * self._updates + self._progress.step
        try:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(folder, purge_step=done + 1 if done else None)
            self._boards["TensorBoard"] = board
        except ImportError:
            pass
        except OSError as error:
            self.say(f"note    no TensorBoard events: {one_line(error)}")

    def _open_wandb(self, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs the package wandb: pip install wandb") from None
        identity = None
        if self.folder is not None:
            # The same run again after a restart.
            remembered = self.folder / "wandb_id.txt"
            if not remembered.exists():
                write_text(remembered, wandb.util.generate_id())
            identity = remembered.read_text(encoding="utf-8").strip()
        try:
            self._boards["Weights & Biases"] = wandb.init(
                project=self._args.project or os.environ.get("WANDB_PROJECT", _WANDB_PROJECT),
                config=dict(config),
                dir=str(self.folder) if self.folder else None,
                id=identity,
                resume="allow",
            )
        except Exception as error:  # no network, no login, ...
            raise UserError(
                f"--wandb: Weights & Biases did not start: {one_line(error)}"
            ) from error

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        self._show(lambda: self.console.print(text, markup=False))

    def _show(self, show: Callable[[], object]) -> None:
        """Show something, until the terminal is gone: that must not lose a run."""
        try:
            show()
        except (OSError, SystemExit):  # a full disk; rich leaves the process at a broken pipe
            self.console.quiet = True
            drop_output()

    def start(self, title: str, total: int, done: int = 0) -> None:
        """Begin to show the progress of an epoch or an evaluation, of which `done` is behind us."""
        self.stop()
        self._title = title
        self._mark = (time.perf_counter(), done)
        if self.console.is_terminal and not self.console.quiet:
            self._bar = ProgressBar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[info]}"),
                console=self.console,
                transient=True,
            )
            self._bar.add_task(title, total=total, completed=done, info="")
            self._show(self._bar.start)

    def on_update(self, lr: float, loss: float | None) -> None:
        """Show what the progress says after an update; `loss` is the epoch's mean, where known."""
        self._session_done += 1
        done = self._progress.step
        number = self._progress.epoch * self._updates + done
        line = done % self._args.log_interval == 0
        if loss is not None:
            self._loss = loss
            if line or done == self._updates:
                self._scalars({"train_running/loss": loss, "train_running/lr": lr}, number)
        if self._bar is None and not line:
            return
        now = time.perf_counter()
        since, before = self._mark
        speed = (done - before) * self._images / max(now - since, 1e-9)
        left = (now - self._session_start) / self._session_done
        left *= self._args.epochs * self._updates - number
        info = (
            f"loss {self._loss:.4f}  lr {lr:.2e}  {speed:,.0f} images/s  "
            f"{memory_used(self._device) / 2**30:.1f} GiB  {duration(left)} left"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, info=info)
        else:
            self.say(f"{self._title}  step {done}/{self._updates}  {info}")

    def on_batch(self, done: int, total: int) -> None:
        """Show that `done` of `total` batches are evaluated."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def stop(self) -> None:
        """Take the progress bar away."""
        if self._bar is not None:
            self._show(self._bar.stop)
            self._bar = None

    def end_epoch(self, record: Mapping[str, Any]) -> None:
        """Write log.txt with its new line `record`, before the checkpoint that counts on it."""
        self._write_log()
        values = {
            key.replace("_", "/", 1) if key.startswith(("train_", "test_")) else key: value
            for key, value in record.items()
            if key != "epoch"
        }
        self._scalars(values, (record["epoch"] + 1) * self._updates)
        self._tell("TensorBoard", lambda board: board.flush())

    def close(self) -> Path | None:
        """Draw the curves and close all files; returns the figure's path if there is one."""
        self.stop()
        self._tell("TensorBoard", lambda board: board.close())
        self._tell("Weights & Biases", self._upload)
        self._tell("Weights & Biases", lambda board: board.finish())
        if self.folder is None or not self._progress.history:
            return None
        try:
            draw_curves(self._progress.history, self.folder / CURVES_FILE, self._args.model)
        except Exception as error:  # whatever a plotting library, its fonts or the disk may raise
            self.say(f"note    no curves: {one_line(error)}")
            return None
        return self.folder / CURVES_FILE

    def _upload(self, run: Any) -> None:
        """Log the checkpoints as an artifact, for `--wandb-ckpt`."""
        if not self._args.wandb_ckpt:
            return
        files = [self.folder / name for name in (LAST, BEST.format(""))]
        if files := [str(path) for path in files if path.exists()]:
            import wandb

            artifact = wandb.Artifact(f"run-{run.id}-checkpoints", type="model")
            for path in files:
                artifact.add_file(path)
            run.log_artifact(artifact)

    def _write_log(self) -> None:
        # Rewritten as a whole: it is small, and so never holds half a line.
        if self.folder is not None:
            lines = [json.dumps(record) + "\n" for record in self._progress.history]
            write_text(self.folder / LOG_FILE, "".join(lines))

    def _scalars(self, values: Mapping[str, float | None], number: int) -> None:
        known = {name: value for name, value in values.items() if value is not None}

        def add(board: Any) -> None:
            for name, value in known.items():
                board.add_scalar(name, value, number)

        self._tell("TensorBoard", add)
        self._tell("Weights & Biases", lambda board: board.log(known, step=number))

    def _tell(self, name: str, action: Callable[[Any], None]) -> None:
        """Have a board do something. If it fails, the training goes on without it."""
        try:
            if name in self._boards:
                action(self._boards[name])
        except Exception as error:  # a full disk, a broken network, ...
            del self._boards[name]
            self.say(f"note    {name} failed, the training goes on without it: {one_line(error)}")
