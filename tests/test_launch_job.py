"""What a job does when it is stopped or its partners die, with Slurm's answers made up."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from deit.errors import UserError
from deit.launch import aftermath, job, slurm, submit
from deit.train.checkpoint import read_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
WAITING = REPOSITORY / "tests" / "fixtures" / "waiting"


@pytest.fixture
def requeued(monkeypatch):
    """The job ids that were put back into the queue."""
    ids: list[str] = []
    monkeypatch.setattr(slurm, "requeue", ids.append)
    return ids


@pytest.mark.parametrize(
    ("state", "rank", "expected"),
    [
        ("RUNNING", 0, ["7"]),
        ("RUNNING", 1, []),  # once for each job, not for each process
        ("COMPLETING", 0, []),  # cancelled
        (None, 0, []),
    ],
)
def test_a_stopped_job_requeues_itself_unless_it_is_ending(
    monkeypatch, requeued, state, rank, expected
):
    monkeypatch.setattr(slurm, "job_state", lambda job_id: state)
    env = SimpleNamespace(global_rank=rank, cluster="slurm", raw_job_id="7")
    with pytest.raises(SystemExit) as stopped:
        job._leave(env, "SIGUSR2")
    assert stopped.value.code == 0
    assert requeued == expected


def test_a_requeue_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(slurm, "job_state", lambda job_id: "RUNNING")
    monkeypatch.setattr(slurm, "requeue", lambda job_id: "Job is not requeueable")
    env = SimpleNamespace(global_rank=0, cluster="slurm", raw_job_id="7")
    with pytest.raises(UserError, match="saved, but could not requeue job 7: Job is not"):
        job._leave(env, "SIGTERM")


def test_a_job_that_cannot_be_released_is_told(monkeypatch):
    asked = []

    def run(command, timeout=0):
        asked.append(command)
        return subprocess.CompletedProcess(command, len(asked) - 1, "", "no controller\n")

    monkeypatch.setattr(slurm, "_run", run)
    submit._release("7")
    assert asked == [["scontrol", "release", "7"]]
    with pytest.raises(UserError, match=r"job 7 is .*held back \(no controller\): scontr"):
        submit._release("7")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_no_held_job_is_left_behind(error, capsys):
    cancelled = []
    jobs = [
        SimpleNamespace(job_id=f"7_{task}", cancel=lambda check, task=task: cancelled.append(task))
        for task in range(2)
    ]
    with pytest.raises(error), submit._cancelled_on_failure(jobs):
        raise error
    assert cancelled == [0, 1]
    assert capsys.readouterr().err == "job 7_0, 7_1 is cancelled\n"
    with submit._cancelled_on_failure(jobs):
        pass
    assert cancelled == [0, 1]


@pytest.mark.parametrize(
    ("status", "state", "lost", "expected"),
    [
        (1, "RUNNING", ["n2"], ["7"]),
        (1, "RUNNING", [], []),  # the training's own failure
        (1, "COMPLETING", ["n2"], []),
        (0, "RUNNING", ["n2"], []),
    ],
)
def test_aftermath(monkeypatch, requeued, status, state, lost, expected):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm, "job_state", lambda job_id: state)
    monkeypatch.setattr(slurm, "lost_nodes", lambda job_id: lost)
    assert aftermath.settle(status) == status
    assert requeued == expected


def test_lost_nodes_are_those_down_restarted_or_deaf(monkeypatch):
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    silent = socket.socket()  # its port is taken, but nobody listens
    silent.bind(("127.0.0.1", 0))
    deaf = silent.getsockname()[1]

    def node(name: str, port: int, state="MIXED", started="2026-01-01T00:00:00") -> str:
        return (
            f"NodeName={name} NodeAddr=127.0.0.1 NodeHostName={name} Port={port} State={state} "
            f"OS=Linux 6.1 #1 SMP BootTime=2026-01-01T00:00:00 SlurmdStartTime={started}\n"
        )

    nodes = node("well", port) + node("deaf", deaf) + node("down", port, "DOWN*+DRAIN")
    nodes += node("restarted", port, started="2026-03-03T10:00:01") + node(
        "unknown", port, started="None"
    )
    answers = {
        "job": "JobId=7 JobState=RUNNING StartTime=2026-03-03T10:00:00 NodeList=n[1-5]\n",
        "node": nodes,
        "config": "SlurmdPort              = 6818\n",
    }

    def run(command, timeout=0):
        assert command[-1] in ("7", "n[1-5]", "config")
        kind = "config" if command[-1] == "config" else command[-2]
        return subprocess.CompletedProcess(command, 0, answers[kind], "")

    monkeypatch.setattr(slurm, "_run", run)
    with listener, silent:
        assert slurm.lost_nodes("7") == ["deaf", "down", "restarted"]
        assert slurm.job_state("7") == "RUNNING"


def test_without_slurm_nothing_is_known(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert slurm.job_state("7") is None
    assert slurm.requeue("7")


@pytest.mark.slow
def test_local_run_is_stopped_and_continued(tmp_path):
    updates, batch = 20, 8
    generator = np.random.default_rng(0)
    for split, count in (("train", updates * batch), ("val", 4)):
        for index in range(count):
            path = tmp_path / "data" / split / f"class{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    words = ["--local", "--ngpus", "1", "--tgpu", "none", "--data-path", str(tmp_path / "data")]
    words += ["--model", "d2_deit_tiny_patch16_LS", "--input-size", "32", "--epochs", "2"]
    words += ["--batch", str(batch), "--num-workers", "0", "--warmup-epochs", "0"]
    words += ["--log-interval", "1", "--threads", "1"]

    def start(*more: str, **wait: str) -> tuple[int, Path]:
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "deit" / "run_with_submitit.py"), *words, *more],
            cwd=tmp_path,
            env=os.environ | {"HOME": str(tmp_path)} | wait,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return (
            int(re.search(r"^  stop    kill (\d+)", done.stdout, re.M)[1]),
            Path(re.search(r"tail -F (.+)", done.stdout)[1]),
        )

    def wait_for(log: Path, text: str) -> str:
        deadline = time.monotonic() + 120
        while not log.exists() or text not in log.read_text():
            assert time.monotonic() < deadline, log.with_suffix(".err").read_text()
            time.sleep(0.1)
        return log.read_text()

    pid, log = start(PYTHONPATH=str(WAITING), WAIT_AT="epoch 2/2  step 3/")
    wait_for(log, "epoch 2/2  step 3/")
    os.kill(pid, signal.SIGTERM)
    step = int(re.search(r"in epoch 2 after step (\d+)", wait_for(log, "saved   "))[1])
    folder = log.parent
    assert folder == tmp_path / "runs" / str(pid)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [str(pid)], "no folder %j"
    assert read_checkpoint(folder / "checkpoint.pth")["step"] == step
    _, log = start("--job-dir", str(folder))
    text = wait_for(log, "\nfinished")
    assert f"going on at epoch 2, step {step}" in text
    assert read_checkpoint(folder / "checkpoint.pth")["epoch"] == 1


def test_folder_of_another_run_with_the_same_job_id_is_not_gone_on_with(tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "checkpoint.pth").touch()
    cancelled = []
    submitted = SimpleNamespace(
        job_id="7",
        paths=SimpleNamespace(folder=tmp_path / "7"),
        cancel=lambda check: cancelled.append("7"),
    )
    asked_for = SimpleNamespace(job_dir=str(tmp_path / "7"))
    submit._refuse_foreign_folder(asked_for, [submitted])
    by_chance = SimpleNamespace(job_dir=str(tmp_path / "%j"))
    with pytest.raises(UserError, match="holds another run, whose job had the same id"):
        submit._refuse_foreign_folder(by_chance, [submitted])
    assert cancelled == ["7"]
