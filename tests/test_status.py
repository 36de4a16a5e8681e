"""The status table, from folders as a training leaves them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from deit.errors import UserError
from deit.launch import status
from deit.launch.status import find_runs, format_seconds, read_status, show_status, sparkline

REPOSITORY = Path(__file__).resolve().parents[1]


def make_run(folder: Path, scores, *, epochs=10, seconds=60.0, **submission) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"args": {"model": "d2_deit_small_patch16_LS", "epochs": epochs}})
    )
    lines = [
        json.dumps({"epoch": epoch, "time": seconds} | ({} if s is None else {"test_acc1": s}))
        for epoch, s in enumerate(scores)
    ]
    (folder / "log.txt").write_text("\n".join(lines))
    if submission:
        (folder / "submission.json").write_text(json.dumps(submission))
    return folder


def test_a_running_job(tmp_path, monkeypatch):
    monkeypatch.setattr(status.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(status.slurm, "job_state", {"17": "RUNNING"}.get)
    run = make_run(tmp_path / "17", [10.0, None, 55.5, 50.0], job_id="17", local=False)
    found = read_status(run)
    assert (found.name, found.model, found.state) == ("17", "d2_deit_small_patch16_LS", "running")
    assert (found.epoch, found.epochs, found.best) == (4, 10, 55.5)
    assert found.seconds_left == 6 * 60
    assert found.curve == "▁█▇"


@pytest.mark.parametrize(
    ("slurm_says", "shown"),
    [
        ("PENDING", "pending"),
        ("FAILED", "failed"),
        ("COMPLETED", "stopped"),
        (None, "job 3 unknown to Slurm"),
    ],
)
def test_states_of_an_unfinished_job(tmp_path, monkeypatch, slurm_says, shown):
    monkeypatch.setattr(status.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(status.slurm, "job_state", lambda job_id: slurm_says)
    run = make_run(tmp_path / "3", [1.0], job_id="3", local=False)
    assert read_status(run).state == shown


def test_a_finished_run_has_no_time_left_whatever_slurm_says(tmp_path):
    run = make_run(tmp_path / "r", [1.0, 2.0], epochs=2, job_id="3", local=False)
    found = read_status(run)
    assert (found.state, found.seconds_left) == ("finished", None)


def test_local_runs_live_as_long_as_their_process(tmp_path):
    alive = make_run(tmp_path / "a", [1.0], job_id=str(os.getpid()), local=True)
    child = subprocess.Popen(["true"])
    child.wait()
    dead = make_run(tmp_path / "b", [1.0], job_id=str(child.pid), local=True)
    assert read_status(alive).state == "running"
    assert read_status(dead).state == "stopped"


def test_the_last_error_of_a_failed_run_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(status.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(status.slurm, "job_state", {"1": "FAILED", "2": "RUNNING"}.get)
    child = subprocess.Popen(["true"])
    child.wait()
    logs = {
        "1": "--- start\nTraceback (most recent call last):\n  File x\n"
        "torch.cuda.OutOfMemoryError: CUDA out of memory\nsrun: error: n1: Exited\n",
        "2": "error: an earlier start\n",
        "3": "--- start\nerror: the first start\n--- start\na warning\n",
        "4": "--- start\nerror: unknown model 'x'\n",
    }
    for name, text in logs.items():
        local = name in "34"
        job = str(child.pid) if local else name
        run = make_run(tmp_path / name, [1.0], job_id=job, local=local, epochs=7)
        (run / f"{job}_0_log.err").write_text(text)
    found = [read_status(tmp_path / name) for name in logs]
    assert [run.state for run in found] == ["failed", "running", "stopped", "failed"]
    wanted = ["torch.cuda.OutOfMemoryError: CUDA out of memory", None, None]
    assert [run.error for run in found] == [*wanted, "error: unknown model 'x'"]
    text = io.StringIO()
    show_status([str(tmp_path)], Console(file=text))
    assert text.getvalue().splitlines()[-1] == "4  error: unknown model 'x'"


def test_a_run_that_has_only_been_submitted(tmp_path, monkeypatch):
    monkeypatch.setattr(status.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(status.slurm, "job_state", lambda job_id: "PENDING")
    folder = tmp_path / "5"
    folder.mkdir()
    (folder / "submission.json").write_text(json.dumps({"job_id": "5", "name": "m"}))
    found = read_status(folder)
    assert (found.model, found.state, found.epoch, found.epochs) == ("m", "pending", 0, None)
    assert (found.best, found.seconds_left, found.curve) == (None, None, "")


def test_log_is_read_from_the_output_folder_of_the_submission(tmp_path):
    output = make_run(tmp_path / "elsewhere", [70.0], epochs=1)
    folder = tmp_path / "8"
    folder.mkdir()
    record = {"job_id": "8", "output_dir": str(output)}
    (folder / "submission.json").write_text(json.dumps(record))
    assert read_status(folder).best == 70.0


def test_a_run_started_by_hand_tells_its_last_sign_of_life(tmp_path, monkeypatch):
    run = make_run(tmp_path / "r", [1.0])
    for age, path in enumerate(run.iterdir()):
        os.utime(path, (0, 10_000 - age))
    monkeypatch.setattr(status.time, "time", lambda: 10_000 + 2 * 3600.0)
    assert read_status(run).state == "last written 2h ago"


def test_folders_of_runs_are_opened(tmp_path):
    for name in ("b", "a"):
        make_run(tmp_path / "runs" / name, [])
    (tmp_path / "runs" / "empty").mkdir()
    assert [path.name for path in find_runs(tmp_path / "runs")] == ["a", "b"]
    with pytest.raises(UserError, match=r"no run in .*empty"):
        find_runs(tmp_path / "runs" / "empty")
    with pytest.raises(UserError, match="not a folder"):
        find_runs(tmp_path / "nowhere")


def test_table_is_whole_in_a_pipe(tmp_path):
    scores = [float(s) for s in range(60)]
    for name in ("one", "two"):
        make_run(tmp_path / name, scores, epochs=300, seconds=1800.0)
    text = io.StringIO()
    show_status([str(tmp_path)], Console(file=text))
    head, first, second = text.getvalue().splitlines()
    assert head.split("  ")[0] == "run"
    assert first.startswith("one")
    assert second.startswith("two")
    for part in ("d2_deit_small_patch16_LS", "60/300", "59.00 %", "5d", sparkline(scores)):
        assert part in first


def test_sparkline():
    assert sparkline([]) == ""
    assert sparkline([3.0]) == sparkline([7.0])
    assert sparkline(list(range(8))) == "▁▂▃▄▅▆▇█"
    thinned = sparkline(list(range(400)), width=8)
    assert thinned == "▁▂▃▄▅▆▇█"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1min"), (3 * 3600 + 300, "3h 5min"), (2 * 86400 + 3600 + 5, "2d 1h")],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_wrong_use_is_one_line(tmp_path):
    for words in (["status"], ["status", str(tmp_path / "none")]):
        done = subprocess.run(
            [sys.executable, "deit/run_with_submitit.py", *words],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
