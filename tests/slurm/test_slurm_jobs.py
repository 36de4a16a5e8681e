"""Trainings on a real Slurm, disturbed in every way that a cluster knows.

Each disturbed run must end with the very weights of the one that was left alone. The network is
tiny, but everything that is random in a training is on: dropout of paths, augmentation, mixup.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import Cluster, wait_until
from training_runs import make_images

from deit.launch.status import read_status
from deit.train.checkpoint import read_checkpoint

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

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

    def seconds(self) -> int:
        """How long it has been running."""
        while not (shown := self.show("RunTime")):
            time.sleep(1)
        hours, minutes, seconds = re.fullmatch(r"(\d+):(\d+):(\d+)", shown).groups()
        return (int(hours) * 60 + int(minutes)) * 60 + int(seconds)

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


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images of noise, as many as make `UPDATES` updates an epoch."""
    return make_images(tmp_path_factory.mktemp("data"), UPDATES * PROCESSES * BATCH, 8)


@pytest.fixture(scope="module")
def submit(cluster: Cluster, data: Path, tmp_path_factory) -> Callable[..., Job]:
    """`submit(*options)`: through the script, as a user does, from another folder.

    With `wait=True` the training waits, the first time, for what the test does to it: in the second
    epoch, so that a checkpoint of the first exists.
    """

    def run(*options: str, wait: bool = False) -> Job:
        words = [*CLUSTER, *TRAINING, "--data-path", str(data), *options]
        env = {"PYTHONPATH": str(WAITING), "WAIT_AT": MID_EPOCH} if wait else {}
        done = launch(cluster, tmp_path_factory.mktemp("runs"), *words, **env)
        assert done.returncode == 0, done.stderr
        job_id = re.search(r"^job (\S+)", done.stdout, re.M)[1]
        folder = re.search(r"^  folder  (.+)", done.stdout, re.M)[1]
        job = Job(cluster, job_id, Path(folder), done.stdout)
        if wait:
            job.wait_until(lambda: MID_EPOCH in job.log, "second epoch")
        return job

    return run


@pytest.fixture(scope="module")
def undisturbed(submit: Callable[..., Job]) -> Job:
    job = submit()
    job.wait_for_end()
    return job


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


def test_two_nodes_with_two_processes_each_train(undisturbed: Job):
    job = undisturbed
    assert job.restarts() == 0
    starts = [path.read_text() for path in sorted(job.folder.glob("*_log.out"))]
    hosts = [
        re.search(r"hostname=(\w+), .*global_rank=(\d)\(4\)", text).groups() for text in starts
    ]
    assert hosts == [("n1", "0"), ("n1", "1"), ("n2", "2"), ("n2", "3")]
    assert job.folder.name == job.id
    for hint in ("tail -F ", f"status {job.folder}", f"scancel {job.id}", "global batch 16"):
        assert hint in job.announcement
    status = read_status(job.folder)
    assert (status.state, status.epoch, status.epochs) == ("finished", EPOCHS, EPOCHS)
    # What the other tests compare does move: the second epoch changes the weights.
    first = read_checkpoint(job.folder / "checkpoint_0000.pth")
    assert largest_difference(first["model"], job.checkpoint()["model"]) > 1e-4


def signal_it(job: Job) -> None:
    job.cluster.query("scancel", "--signal=USR2", job.id, check=True)


def let_its_time_run_out(job: Job) -> None:
    # Slurm looks at time limits, which are whole minutes, every half minute.
    minutes = math.ceil((job.seconds() + 50) / 60)
    job.cluster.query("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}", check=True)
    job.wait_until(lambda: job.restarts() == 1, "requeue at the time limit", 120)
    job.cluster.query("scontrol", "update", f"JobId={job.id}", "TimeLimit=60", check=True)


def evict_it(job: Job) -> None:
    urgent = ["sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true"]
    job.cluster.query(*urgent, check=True)
    job.wait_until(lambda: job.restarts() == 1, "requeue in favour of the urgent job", 120)


@pytest.mark.parametrize("strike", [signal_it, let_its_time_run_out, evict_it])
def test_a_struck_job_saves_in_mid_epoch_and_requeues(strike, submit, undisturbed: Job):
    job = submit("--signal-delay", "110", wait=True)
    strike(job)
    job.wait_for_end()
    assert job.restarts() == 1
    (step,) = job.stops()
    assert EARLY <= step < UPDATES
    assert f"going on at epoch 2, step {step}" in job.log
    assert_same_training(job, undisturbed)


def test_node_that_dies_is_survived_from_the_last_checkpoint(submit, undisturbed: Job):
    job = submit(wait=True)
    job.cluster.kill_node("n2")
    # Slurm notices after SlurmdTimeout; should the survivors fail before that, their job waits.
    job.wait_until(lambda: job.restarts() == 1, "requeue", 180)
    time.sleep(20)  # until the controller no longer tells the dead node to end the job
    job.cluster.start_node("n2")
    job.wait_for_end()
    assert job.restarts() == 1
    assert job.stops() == []
    assert "going on at epoch 2, step 0" in job.log
    assert_same_training(job, undisturbed)


def test_cancelled_run_saves_and_stays_cancelled(submit, monkeypatch):
    job = submit(*ALONE, wait=True)
    job.cluster.query("scancel", job.id, check=True)
    job.wait_until(lambda: job.state() == "CANCELLED", "end", 60)
    assert "not requeued" in job.log
    assert job.checkpoint()["step"] == job.stops()[0]
    monkeypatch.setenv("SLURM_CONF", job.cluster.env["SLURM_CONF"])
    assert read_status(job.folder).state == "cancelled"


def test_failed_training_is_not_requeued(submit):
    job = submit(*ALONE, "--lr", "1e30", "--unscale-lr", "--opt", "sgd", "--model-ema-decay", "0")
    job.wait_until(lambda: job.state() == "FAILED", "failure")
    assert job.restarts() == 0
    (errors,) = job.folder.glob("*_log.err")
    assert "the loss became infinite or NaN" in errors.read_text()


def test_array_runs_in_folders_of_their_own_and_each_requeues_itself(submit):
    job = submit(*ALONE, "--array", "seed=3-4", wait=True)
    array = job.id.partition("_")[0]
    last = Job(job.cluster, f"{array}_1", job.folder.parent / f"{array}_1", "")
    last.wait_until(lambda: MID_EPOCH in last.log, "second epoch")
    job.cluster.query("scancel", "--signal=USR2", array, check=True)
    for number, run in enumerate((job, last)):
        run.wait_for_end()
        assert run.restarts() == 1
        assert (run.checkpoint()["args"]["seed"], len(run.stops())) == (3 + number, 1)


def test_refused_submission_is_one_line(cluster: Cluster, tmp_path):
    done = launch(cluster, tmp_path, "--tgpu", "none", "--partition", "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: sbatch refused the job")
    assert "invalid partition" in done.stderr
    assert done.stderr.count("\n") == 1
