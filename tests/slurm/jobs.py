"""What the tests here submit: a tiny training, and how the job of it is watched.

Everything that is random in a training is on: dropout of paths, augmentation, mixup.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cluster import Cluster, wait_until

from deit.train.checkpoint import read_checkpoint

MARKS = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]
REPOSITORY = Path(__file__).resolve().parents[2]
EPOCHS, UPDATES, PROCESSES, BATCH = 2, 16, 4, 4
EARLY = 3  # the step of the second epoch at which the tests strike
MID_EPOCH = f"epoch {EPOCHS}/{EPOCHS}  step {EARLY}/"
WAITING = REPOSITORY / "tests" / "fixtures" / "waiting"
TRAINING = [
    *("--model", "d2_deit_tiny_patch16_LS", "--input-size", "32", "--patch-size", "16"),
    *("--epochs", str(EPOCHS), "--batch-size", str(BATCH), "--warmup-epochs", "0", "--lr", "0.01"),
    *("--num-workers", "1", "--threads", "1", "--log-interval", "1", "--save-freq", "1"),
]
CLUSTER = ["--nodes", "2", "--ngpus", "2", "--tgpu", "none", "--cpus-per-task", "1"]
# submitit takes every signal within ten minutes of the limit for a time-out.
CLUSTER += ["--time", "60"]
# The same training in one process, where more would show nothing more.
ALONE = ["--nodes", "1", "--ngpus", "1", "--batch-size", str(PROCESSES * BATCH)]


@dataclass
class Job:
    """A submitted training."""

    cluster: Cluster
    id: str
    folder: Path
    announcement: str
    submitted: float = field(default_factory=time.monotonic)

    @property
    def log(self) -> str:
        path = self.folder / f"{self.id}_0_log.out"
        return path.read_text() if path.exists() else ""

    def show(self, name: str) -> str | None:
        """One of the things that Slurm says of the job; None if it does not answer."""
        shown = self.cluster.query("scontrol", "-o", "show", "job", self.id)
        found = re.search(rf"{name}=(\S+)", shown)
        return found and found[1]

    def state(self) -> str:
        return self.show("JobState") or "UNKNOWN"

    def restarts(self) -> int:
        return int(self.show("Restarts") or -1)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = 240) -> None:
        """Wait for `condition`; on time-out fail with all logs."""
        if wait_until(condition, timeout):
            return
        state = self.state()
        self.cluster.query("scancel", self.id)
        logs = "".join(
            f"--- {path.name}\n{path.read_text()[-6000:]}\n"
            for path in sorted(self.folder.glob("*_log.*"))
        )
        pytest.fail(f"no {what} in {timeout} s, job is {state}\n{logs}{self.cluster.logs()}")

    def wait_for_end(self) -> None:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait_until(lambda: self.state() in over, "end")
        assert self.state() == "COMPLETED", self.log[-2000:]

    def checkpoint(self) -> dict:
        return read_checkpoint(self.folder / "checkpoint.pth")

    def stops(self) -> list[int]:
        """The steps of the second epoch after which the training was stopped and saved."""
        return [int(step) for step in re.findall(r"in epoch 2 after step (\d+)", self.log)]


def launch(
    cluster: Cluster, folder: Path, *words: str, **env: str
) -> subprocess.CompletedProcess[str]:
    """Start the launcher in `folder`, as a user does."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "deit" / "run_with_submitit.py"), *words],
        cwd=folder,
        env=cluster.env | env | {"HOME": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_same_training(job: Job, undisturbed: Job) -> None:
    """Weights and average are those of the undisturbed run, the log has no gap and no repeat.

    Not to the last bit, because DDP arranges its buckets anew after the first step of a process,
    and a sum over four processes depends on the arrangement.
    """
    ours, theirs = job.checkpoint(), undisturbed.checkpoint()
    assert ours["epoch"] == theirs["epoch"] == EPOCHS - 1
    for part in ("model", "model_ema"):
        assert ours[part].keys() == theirs[part].keys()
        assert largest_difference(ours[part], theirs[part]) < 1e-6
    log, reference = (
        [json.loads(line) for line in (run.folder / "log.txt").open()] for run in (job, undisturbed)
    )
    assert [record["epoch"] for record in log] == list(range(EPOCHS))
    for record, wanted in zip(log, reference, strict=True):
        for key in ("train_loss", "train_lr", "test_loss", "test_acc1"):
            assert record[key] == pytest.approx(wanted[key], rel=1e-5)


def largest_difference(ours: dict, theirs: dict) -> float:
    return max((ours[key].double() - theirs[key]).abs().max().item() for key in theirs)
