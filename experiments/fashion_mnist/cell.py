"""Train one cell of the grid, from where it was left, with the parts that `deit/main.py` uses."""

from __future__ import annotations

import platform
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deit.saving import CheckpointWriter
from deit.train.args import parse_args
from deit.train.checkpoint import read_checkpoint
from deit.train.distributed import DistContext
from deit.train.engine import RunningLoss, count_parameters, evaluate, train_one_epoch
from deit.train.folder import LAST
from deit.train.metrics import Accuracy
from deit.train.reporting import environment
from deit.train.resume import state_dict
from deit.train.run import start_training
from deit.train.stopping import StopAgreement, Stopped
from experiments.fashion_mnist.grid import Cell, Plan
from experiments.fashion_mnist.images import Images, TestBatches, training_batches
from experiments.fashion_mnist.networks import CLASSES, IMAGE_SIZE

TEST_BATCH = 500
# What a published result must name; the rest of the environment is private to a machine.
PUBLIC = ("python", "torch", "timm", "numpy", "cuda", "device", "threads", "git_commit")


@dataclass
class Data:
    """Both splits on one device."""

    train: Images
    test: Images

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Data:
        return cls(Images.load(folder, "train", device), Images.load(folder, "val", device))


def arguments(cell: Cell, plan: Plan, device: torch.device, folder: Path) -> Namespace:
    """The command line of `deit/main.py` for a cell: one recipe for all networks."""
    options = {
        "model": cell.network.name,
        "input-size": IMAGE_SIZE,
        "nb-classes": CLASSES,
        "device": device,
        "output-dir": folder,
        "seed": cell.seed,
        "batch-size": plan.batch_size,
        "epochs": plan.legs,
        "opt": "adamw",
        "lr": plan.lr,
        "weight-decay": plan.weight_decay,
        "clip-grad": plan.clip_grad,
        "warmup-epochs": plan.warmup,
        "min-lr": 0,
        "smoothing": plan.smoothing,
        "layer-scale-init-value": plan.layer_scale,
        "drop-path": 0,
        "mixup": 0,
        "cutmix": 0,
    }
    argv = [f"--{name}={value}" for name, value in options.items()]
    return parse_args([*argv, "--unscale-lr", "--no-model-ema", "--no-use-amp"])


class Training:
    """One cell under way."""

    def __init__(
        self, cell: Cell, plan: Plan, data: Data, device: torch.device, folder: Path
    ) -> None:
        self.cell, self.plan, self.data = cell, plan, data
        self.processes = DistContext(device)
        self.origin = {"cell": cell.as_dict(), "plan": asdict(plan)}
        # On a CPU others may take turns with us: its own time is what a training needs.
        self.clock = time.process_time if device.type == "cpu" else time.perf_counter
        self.writer = CheckpointWriter(folder)
        cell.network.register()
        self.args = arguments(cell, plan, device, folder)
        last = folder / LAST
        checkpoint = read_checkpoint(last) if last.exists() else None
        if checkpoint is not None and checkpoint.get("origin") != self.origin:
            checkpoint = None  # of another plan
        self.state, _ = start_training(
            self.args,
            self.processes,
            CLASSES,
            updates=plan.updates,
            images=plan.batch_size,
            checkpoint=checkpoint,
        )
        self.start = self.state.progress.epoch * plan.updates + self.state.progress.step

    def run(self, command: str) -> dict[str, Any]:
        """Train to the end and test; returns the result.

        Raises:
            Stopped: a stop was asked for; the state is saved.
        """
        train = self.data.train.subset(self.cell.fraction, self.cell.seed)
        batches = training_batches(
            train,
            batch_size=self.plan.batch_size,
            seed=self.cell.seed,
            flip=self.cell.flip,
            shift=self.plan.shift,
            start=self.start,
        )
        try:
            while self.state.progress.epoch < self.plan.legs:
                self._leg(batches)
        except Stopped:
            self._save()
            raise
        finally:
            self.writer.close()
        progress = self.state.progress
        return self.origin | {
            "parameters": count_parameters(self.state.model),
            "training_images": len(train),
            "test_images": len(self.data.test),
            "seconds": round(sum(leg["seconds"] for leg in progress.history), 3),
            "curve": progress.history,
            **views(self.state.model, self.data.test),
            "command": command,
            "environment": public_environment(self.processes.device),
        }

    def _leg(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One leg, or what is left of it, and a look at the test set."""
        progress, plan = self.state.progress, self.plan
        before, start = progress.seconds, self.clock()

        def note(done: int, loss: float | None) -> None:
            progress.step, progress.images = done, done * plan.batch_size
            progress.seconds = before + self.clock() - start

        agreement = StopAgreement()
        loss = train_one_epoch(
            self.state,
            batches,
            updates=plan.updates,
            agreement=agreement,
            on_update=note,
        )
        note(plan.updates, loss)
        scores = evaluate(
            self.state.model,
            TestBatches(self.data.test, TEST_BATCH),
            self.args,
            precision=self.state.precision,
            processes=self.processes,
            agreement=agreement,
        )
        progress.next_epoch(
            {
                "updates": (progress.epoch + 1) * plan.updates,
                "seconds": round(progress.seconds, 3),
                "train_loss": round(loss, 5),
                "accuracy": round(scores.acc1, 3),
            }
        )
        self.state.running = RunningLoss(self.processes.device)
        self._save()

    def _save(self) -> None:
        self.writer.save(state_dict(self.state) | {"origin": self.origin}, [LAST])
        self.writer.flush()


@torch.no_grad()
def views(model: nn.Module, test: Images) -> dict[str, float]:
    """Accuracy on the test images and on their mirror images, and how often both get one answer.

    All in percent.
    """
    model.eval()
    logits = [
        torch.cat([model(images) for images, _ in TestBatches(view, TEST_BATCH)])
        for view in (test, test.mirrored())
    ]
    accuracies = []
    for view in logits:
        accuracy = Accuracy(view.device)
        accuracy.update(view, test.targets)
        accuracies.append(accuracy.compute().acc1)
    agree = (logits[0].argmax(1) == logits[1].argmax(1)).double().mean().item()
    return {
        "accuracy": round(accuracies[0], 3),
        "accuracy_mirrored": round(accuracies[1], 3),
        "agreement": round(100 * agree, 3),
    }


def public_environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware."""
    known = environment(device, 1)
    system = f"{platform.system()} {platform.machine()}"
    return {name: known[name] for name in PUBLIC} | {"processor": processor(), "system": system}


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
