"""What a job does when it is stopped or its partners die, with Slurm's answers made up."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from deit.errors import UserError
from deit.launch import job, submit
from deit.train import slurm
from deit.train.checkpoint import read_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
WAITING = REPOSITORY / "tests" / "fixtures" / "waiting"


@pytest.mark.parametrize(
    ("state", "rank", "problem", "expected"),
    [
        ("RUNNING", 0, None, [("requeue", "7_1")]),
        ("RUNNING", 1, None, []),  # once for each job, not for each process
        ("COMPLETING", 0, None, []),  # cancelled
        (None, 0, None, []),
        ("RUNNING", 0, "no controller", [("requeue", "7_1")]),
    ],
)
def test_a_stopped_job_requeues_itself_unless_it_is_ending(
    state, rank, problem, expected, monkeypatch
):
    asked = []
    monkeypatch.setattr(slurm, "job_states", lambda job_id: [state] if state else [])
    monkeypatch.setattr(
        slurm, "control", lambda action, job_id: asked.append((action, job_id)) or problem
    )
    env = SimpleNamespace(global_rank=rank, cluster="slurm", job_id="7_1")
    with pytest.raises((SystemExit, UserError)) as stopped:
        job._leave(env, "SIGUSR2")
    assert asked == expected
    if problem:
        assert str(stopped.value) == "saved, but could not requeue job 7_1: no controller"
        with pytest.raises(UserError, match=r"job 7 is .*held back \(no controller\): scontr"):
            submit._release("7")
    else:
        assert stopped.value.code == 0


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (OSError("full"), "job 7_0, 7_1 is cancelled\n"),
        (KeyboardInterrupt(), "job 7_0, 7_1 is cancelled\n"),
        (UserError("taken"), ""),  # in the error's own line
    ],
)
def test_no_job_is_left_behind(error, printed, capsys):
    cancelled = []
    jobs = [
        SimpleNamespace(job_id=f"7_{task}", cancel=lambda check, task=task: cancelled.append(task))
        for task in range(2)
    ]
    with submit._cancelled_on_failure(jobs):
        pass
    assert cancelled == []
    with pytest.raises(type(error)) as raised, submit._cancelled_on_failure(jobs):
        raise error
    assert cancelled == [0, 1]
    assert capsys.readouterr().err == printed
    assert printed or str(raised.value) == "taken; job 7_0, 7_1 is cancelled"


@pytest.mark.parametrize(
    ("tool", "answer", "states"),
    [
        ("scontrol", "JobId=7 JobState=FAILED A=b", ["FAILED"]),
        ("scontrol", "JobId=7 JobState=RUNNING\nJobId=8 JobState=PENDING", ["RUNNING", "PENDING"]),
        ("sacct", "CANCELLED by 1000", ["CANCELLED"]),
        ("nothing", "", []),
    ],
)
def test_the_state_of_a_job_from_the_controller_or_from_accounting(
    tool, answer, states, tmp_path, monkeypatch
):
    (tmp_path / tool).write_text(f"#!/bin/sh\necho '{answer}'\n")
    (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.job_states("7") == states
    assert states or slurm.control("requeue", "7")


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
    (tmp_path / "checkpoint.pth").touch()
    jobs = [SimpleNamespace(paths=SimpleNamespace(folder=tmp_path))]
    asked_for = SimpleNamespace(asked=SimpleNamespace(job_dir=str(tmp_path)))
    submit._refuse_foreign_folder(asked_for, jobs)
    by_chance = SimpleNamespace(asked=SimpleNamespace(job_dir=str(tmp_path.parent / "%j")))
    with pytest.raises(UserError, match="holds another run, whose job had the same id"):
        submit._refuse_foreign_folder(by_chance, jobs)
