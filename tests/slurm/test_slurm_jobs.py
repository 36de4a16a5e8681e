"""Trainings on a real Slurm, disturbed in every way that a cluster knows but the loss of a node.

Each disturbed run must end with the very weights of the one that was left alone.
"""

from __future__ import annotations

import math
import re
import time

import pytest
from cluster import Cluster
from jobs import (
    ALONE,
    EARLY,
    EPOCHS,
    MARKS,
    MID_EPOCH,
    UPDATES,
    Job,
    assert_same_training,
    largest_difference,
    launch,
)

from deit.launch.status import read_status
from deit.train.checkpoint import read_checkpoint

pytestmark = MARKS


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
    minutes = math.ceil((time.monotonic() - job.submitted + 50) / 60)
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
