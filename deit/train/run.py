"""A training under way: its objects, its place, its folder."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from deit.data import DeviceLoader
from deit.saving import CheckpointWriter, SaveError, clean_temporaries
from deit.train.distributed import DistContext
from deit.train.engine import NonFiniteLossError, TrainStep, evaluate
from deit.train.folder import BEST, EPOCH_COPY, LAST, check_unused, claim, clear
from deit.train.metrics import Scores
from deit.train.reporting import Reporter
from deit.train.resume import TrainingState
from deit.train.stopping import StopAgreement

__all__ = ["LAST", "Run", "claim_folder", "open_writer"]


@dataclass
class Run:
    """A training that is ready to start or to go on."""

    args: Namespace
    processes: DistContext
    train_step: TrainStep
    state: TrainingState
    evaluated: dict[str, nn.Module]
    """What is evaluated: as "" the averaged network or the trained one, as "_ema" the averaged one
    beside it, if both are."""
    train_loader: DeviceLoader
    val_loader: DeviceLoader | None
    """None with --disable-eval."""
    batches: int
    """Batches in an epoch; those that do not fill an update at its end are not used."""
    updates: int
    """Optimizer updates in an epoch."""
    images: int
    """Images in an update, over all processes."""
    parameters: int
    """Trainable ones."""
    agreement: StopAgreement
    reporter: Reporter
    writer: CheckpointWriter | None

    def note_update(self, done: int, loss: float | None) -> None:
        """After each update of an epoch: remember the place, and show it."""
        progress = self.state.progress
        progress.step, progress.images = done, done * self.images
        if self.writer is not None:
            self.writer.check()
        self.reporter.on_update(progress.epoch, done, self.learning_rate(), loss)

    def learning_rate(self) -> float:
        """That of the layers without reduction."""
        return max(group["lr"] for group in self.state.optimizer.param_groups)

    def evaluate(self, network: nn.Module) -> Scores:
        """The scores of one of the `evaluated` networks on the validation data."""
        args = self.args
        self.reporter.start("testing", len(self.val_loader))
        return evaluate(
            network,
            self.val_loader,
            precision=self.state.precision,
            processes=self.processes,
            sharded=args.dist_eval,
            batch_size=args.batch_size,
            input_size=args.input_size,
            pad=args.compile,
            flop=args.flop_eval,
            agreement=self.agreement,
            on_batch=self.reporter.on_batch,
        )

    def save(self, names: list[str]) -> None:
        """Save the state under `names` in the output folder, if there is one."""
        if self.args.output_dir and self.args.save_ckpt:
            checkpoint = self.state.state_dict()
            if self.writer is not None:
                self.writer.save(checkpoint, names)
                self._drop_copies(names)

    def _drop_copies(self, coming: list[str]) -> None:
        """Keep the last `--save-ckpt-num` of the epochs' copies; `coming` are being written."""
        folder, kept = Path(self.args.output_dir), self.args.save_ckpt_num
        present = {path.name for path in folder.iterdir()}
        numbers = {re.fullmatch(r"checkpoint_(\d+)\.pth", name) for name in present | {*coming}}
        epochs = sorted(int(match[1]) for match in numbers if match)
        for epoch in epochs[:-kept] if kept else ():
            (folder / EPOCH_COPY.format(epoch)).unlink(missing_ok=True)

    def save_epoch(self, epoch: int, best: list[str]) -> None:
        """Save the end of `epoch`, the best so far of the kinds `best` of evaluated networks."""
        names = [BEST.format(kind) for kind in best]
        if self.args.save_freq and (epoch + 1) % self.args.save_freq == 0:
            names.append(EPOCH_COPY.format(epoch))
        self.save([*names, LAST])  # what a resumed run reads comes last

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

    def explain(self, error: NonFiniteLossError) -> str:
        """Where the loss broke, what is still good, and what to try."""
        epoch, step = self.state.progress.epoch, error.update + 1
        return (
            f"the loss became infinite or NaN in epoch {epoch + 1} at step {step} "
            f"(update {epoch * self.updates + step}); {self.last_state()}; try a lower --lr, "
            "--clip-grad 1, more --warmup-epochs, --amp-dtype bfloat16 or --no-use-amp"
        )

    def close(self) -> None:
        """End the loader's workers and wait for the last write; also after a failure."""
        self.train_loader.close()
        if self.val_loader is not None:
            self.val_loader.close()
        if self.writer is not None:
            self.writer.close()


@contextmanager
def claim_folder(args: Namespace, processes: DistContext) -> Iterator[None]:
    """Have the output folder for this training alone, on rank 0, until it ends.

    Raises:
        UserError: it cannot be made, another process trains in it, or it holds a training that
            this one would replace.
    """
    if not args.output_dir or not processes.is_main:
        yield
        return
    folder = Path(args.output_dir)
    with claim(folder):
        if not args.overwrite:
            check_unused(folder, args.resume)
        yield


def open_writer(args: Namespace, processes: DistContext, fresh: bool) -> CheckpointWriter | None:
    """What saves checkpoints, on rank 0 if there is an output folder, which this process holds.

    Args:
        fresh: the training starts; what an earlier one has left goes.
    """
    if not args.output_dir or not processes.is_main:
        return None
    folder = Path(args.output_dir)
    clean_temporaries(folder)
    if fresh:
        clear(folder)
    return CheckpointWriter(folder)
