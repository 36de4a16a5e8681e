"""What a job does when it is stopped or its partners die, with Slurm's answers made up."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from submitit.core.utils import JobPaths
from training_runs import TINY, load

from deit.errors import UserError
from deit.launch import job, preflight, submit
from deit.launch.spec import make_spec
from deit.train import slurm

REPOSITORY = Path(__file__).resolve().parents[1]
ARRAY = ["--array", "seed=3-4"]
WAITING = REPOSITORY / "tests" / "fixtures" / "waiting"


@pytest.fixture
def slurm_says(monkeypatch):
    """`slurm_says(state, problem)`: Slurm's answers; the list fills with what it is asked to do."""
    asked: list[tuple[str, str]] = []

    def answer(state: str | None, problem: str | None = None) -> list[tuple[str, str]]:
        monkeypatch.setattr(slurm, "job_states", lambda job_id: [state] if state else [])
        monkeypatch.setattr(
            slurm, "control", lambda action, job_id: asked.append((action, job_id)) or problem
        )
        return asked

    return answer


@pytest.fixture
def submitted(tmp_path, monkeypatch, no_cluster_file) -> list[Mock]:
    """Two jobs that `submit` gets from Slurm, held; it does not look at what they will do."""
    ids = ("7_0", "7_1")
    jobs = [Mock(job_id=job_id, paths=JobPaths(tmp_path / "%j", job_id)) for job_id in ids]
    for made in jobs:
        made.paths.folder.mkdir()

    def executor(spec, hold: bool) -> SimpleNamespace:
        assert hold, "it may start before its folder is recorded"
        return SimpleNamespace(submit_array=lambda wanted: jobs[: len(wanted)])

    monkeypatch.setattr(submit.shutil, "which", lambda name: name)
    monkeypatch.setattr(preflight, "check", lambda spec: None)
    monkeypatch.setattr(submit, "_slurm_executor", executor)
    return jobs


def test_submitted_jobs_are_recorded_and_released(submitted, slurm_says, tmp_path, capsys):
    asked = slurm_says("PENDING")
    submit.submit(make_spec([*ARRAY, "--output-dir", "out/%j"]))
    assert asked == [("release", "7")]
    record = json.loads((submitted[1].paths.folder / "submission.json").read_text())
    assert (record["job_id"], record["local"], record["epochs"]) == ("7_1", False, 300)
    assert record["command"].endswith("deit/main.py --output-dir out/%j --seed 4")
    assert record["output_dir"] == os.path.abspath("out/7_1")
    shown = capsys.readouterr().out
    assert "\njob 7_1 (seed 4)\n" in shown
    assert "stop    scancel 7_1\n" in shown
    # going on in a folder that was asked for by its name
    (submitted[0].paths.folder / "checkpoint.pth").touch()
    again = ["--job-dir", str(submitted[0].paths.folder)]
    submit.submit(make_spec(again))
    assert asked.pop() == asked[0]
    (tmp_path / "held.toml").write_text("[sbatch]\nhold = true\n")
    submit.submit(make_spec([*again, "--cluster-file", str(tmp_path / "held.toml")]))
    assert len(asked) == 1, "the user releases it"
    slurm_says("PENDING", "no controller")
    with pytest.raises(UserError, match=r"job 7 is .*held back \(no controller\): scontr"):
        submit.submit(make_spec(again))
    assert not any(made.cancel.called for made in submitted)


def test_no_job_is_left_behind(submitted, slurm_says, monkeypatch, capsys):
    asked = slurm_says("PENDING")
    outcome = "job 7_0, 7_1 is cancelled"
    (submitted[1].paths.folder / "checkpoint.pth").touch()
    with pytest.raises(UserError, match=f"7_1 holds another run, whose job had .*; {outcome}$"):
        submit.submit(make_spec(ARRAY))
    assert all(made.cancel.called for made in submitted)
    monkeypatch.setattr(submit.json, "dumps", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        submit.submit(make_spec(ARRAY))
    assert capsys.readouterr().err == f"{outcome}\n"
    assert asked == []


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
    state, rank, problem, expected, slurm_says
):
    asked = slurm_says(state, problem)
    env = SimpleNamespace(global_rank=rank, cluster="slurm", job_id="7_1")
    with pytest.raises((SystemExit, UserError)) as stopped:
        job._leave(env, "SIGUSR2")
    assert asked == expected
    refused = "saved, but could not requeue job 7_1: no controller"
    assert str(stopped.value) == (refused if problem else "0")


@pytest.mark.parametrize(
    ("tool", "answer", "states"),
    [
        ("scontrol", "JobId=7 JobState=FAILED A=b", ["FAILED"]),
        ("scontrol", "JobId=7 JobState=RUNNING\nJobId=8 JobState=PENDING", ["RUNNING", "PENDING"]),
        ("sacct", "CANCELLED by 1000", ["CANCELLED"]),
        ("scontrol", "slurm_load_jobs error: Invalid job id specified", []),
        ("scontrol", "slurm_load_jobs error: Unable to contact slurm controller", []),
        ("nothing", "", []),
    ],
)
def test_the_state_of_a_job_from_the_controller_or_from_accounting(
    tool, answer, states, tmp_path, monkeypatch
):
    (tmp_path / tool).write_text(f"#!/bin/sh\necho '{answer}'\necho '{answer}' >&2\n")
    (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.job_states("7") == states
    assert slurm.has_forgotten("7") == ("Invalid job id" in answer)
    assert (slurm.control("requeue", "7") is None) == (tool == "scontrol")


def test_a_job_starts_with_this_code_and_deaf_to_stop_signals(tmp_path):
    code = "import deit, os, signal; print(deit.__file__, os.environ['PYTHONPATH']); "
    code += "print(*(signal.getsignal(number).name for number in (15, signal.SIGUSR2)))"
    env = os.environ | {"PYTHONPATH": "/other place"}
    command = [*shlex.split(submit._PYTHON), "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    wanted = f"{REPOSITORY}/deit/__init__.py {REPOSITORY}:/other place\nSIG_IGN SIG_IGN\n"
    assert done.stdout == wanted, done.stderr


@pytest.mark.slow
def test_local_run_is_stopped_and_continued(data, tmp_path):
    words = ["--local", "--ngpus", "1", "--tgpu", "none", *TINY, "--log-interval", "1"]
    words += ["--data-path", str(data)]

    def start(*more: str, **wait: str) -> tuple[int, Path]:
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "deit" / "run_with_submitit.py"), *words, *more],
            cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path)} | wait,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        pid = re.search(r"^  stop    kill (\d+)", done.stdout, re.M)[1]
        return int(pid), Path(re.search(r"tail -F (.+)", done.stdout)[1])

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
    assert list((tmp_path / "runs").iterdir()) == [tmp_path / "runs" / str(pid)], "no folder %j"
    assert load(folder / "checkpoint.pth")["step"] == step
    _, log = start("--job-dir", str(folder))
    assert f"going on at epoch 2, step {step}" in wait_for(log, "\nfinished")
    assert load(folder / "checkpoint.pth")["epoch"] == 1
