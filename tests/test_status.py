"""The status table, from folders as a training leaves them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from deit.errors import one_line_errors
from deit.launch.status import RunStatus, read_status, show_status, sparkline
from deit.run_with_submitit import run
from deit.train import slurm

DEAD = str(2**22 + 1)  # more processes than there can be


@pytest.fixture(autouse=True)
def slurm_says(monkeypatch) -> dict[str, str]:
    """The states of the jobs that this Slurm knows."""
    states: dict[str, str] = {}
    monkeypatch.setattr(slurm, "job_states", lambda job: [states[job]] if job in states else [])
    return states


def make_run(folder: Path, scores, *, epochs=10, seconds=60.0, **submission) -> Path:
    folder.mkdir(parents=True)
    config = {"args": {"model": "d2_deit_small_patch16_LS", "epochs": epochs}}
    (folder / "config.json").write_text(json.dumps(config))
    scored = [{} if score is None else {"test_acc1": score} for score in scores]
    records = [{"epoch": n, "time": seconds} | score for n, score in enumerate(scored)]
    (folder / "log.txt").write_text("\n".join(map(json.dumps, records)))
    if submission:
        (folder / "submission.json").write_text(json.dumps(submission))
    return folder


@pytest.mark.parametrize(
    ("job", "local", "answer", "epochs", "shown"),
    [
        ("3", False, "RUNNING", 10, "running"),
        ("3", False, "PENDING", 10, "pending"),
        ("3", False, "FAILED", 10, "failed"),
        ("3", False, "COMPLETED", 10, "stopped"),
        ("3", False, None, 10, "job 3 unknown to Slurm"),
        ("3", False, "FAILED", 4, "finished"),  # whatever Slurm says
        ("own", True, None, 10, "running"),
        (DEAD, True, None, 10, "stopped"),
    ],
)
def test_states(job, local, answer, epochs, shown, tmp_path, slurm_says):
    job = str(os.getpid()) if job == "own" else job
    if answer:
        slurm_says[job] = answer
    scores = [10.0, None, 55.5, 50.0]
    found = read_status(make_run(tmp_path / "r", scores, epochs=epochs, job_id=job, local=local))
    assert (found.name, found.model, found.state) == ("r", "d2_deit_small_patch16_LS", shown)
    assert (found.epoch, found.epochs, found.best) == (4, epochs, 55.5)
    assert found.seconds_left == (None if shown == "finished" else 6 * 60)
    assert found.curve == "▁█▇"


def test_the_last_error_of_a_failed_run_is_shown(tmp_path, slurm_says, capsys):
    slurm_says |= {"1": "FAILED", "2": "RUNNING"}
    logs = {
        "1": "--- start\nTraceback (most recent call last):\n  File x\n"
        "torch.cuda.OutOfMemoryError: CUDA out of memory\nsrun: error: n1: Exited\n",
        "2": "error: an earlier start\n",
        "3": "--- start\nerror: the first start\n--- start\na warning\n",
        "4": "--- start\nerror: unknown model 'x'\n",
    }
    for name, text in logs.items():
        local = name in "34"
        run = make_run(tmp_path / name, [1.0], job_id=DEAD if local else name, local=local)
        (run / f"{name}_0_log.err").write_text(text)
    found = [(run.state, run.error) for run in (read_status(tmp_path / name) for name in logs)]
    assert found == [
        ("failed", "torch.cuda.OutOfMemoryError: CUDA out of memory"),
        ("running", None),
        ("stopped", None),
        ("failed", "error: unknown model 'x'"),
    ]
    show_status([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == "4  error: unknown model 'x'"


def test_a_run_that_has_only_been_submitted_and_one_that_writes_elsewhere(tmp_path, slurm_says):
    slurm_says["5"] = "PENDING"
    record = {"job_id": "5", "name": "m"}
    (tmp_path / "submission.json").write_text(json.dumps(record))
    wanted = RunStatus(tmp_path.name, "m", "pending", 0, None, None, None, "")
    assert read_status(tmp_path) == wanted
    output = make_run(tmp_path / "elsewhere", [70.0])
    (tmp_path / "submission.json").write_text(json.dumps(record | {"output_dir": str(output)}))
    assert read_status(tmp_path).best == 70.0


def test_a_run_started_by_hand_tells_its_last_sign_of_life(tmp_path, monkeypatch):
    run = make_run(tmp_path / "r", [1.0])
    for age, path in enumerate(run.iterdir()):
        os.utime(path, (0, 10_000 - age))
    monkeypatch.setattr("time.time", lambda: 10_000 + 2 * 3600.0)
    assert read_status(run).state == "last written 2h ago"


def test_table_of_a_folder_of_runs(tmp_path, capsys):
    scores = [float(s) for s in range(60)]
    for name in ("two", "one"):
        make_run(tmp_path / name, scores, epochs=300, seconds=1800.0)
    (tmp_path / "empty").mkdir()
    show_status([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == ["run", "one", "two"]
    for part in ("d2_deit_small_patch16_LS", "60/300", "59.00 %", "5d", sparkline(scores)):
        assert part in lines[1]


def test_folders_of_others_are_noted_and_hide_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("a/run"), [70.0])
    Path("a/run/config.json").write_text('{"args": null}')
    wrong = {
        "config.json": [b"[]", b'{"args": {"epochs": "x"}}', b"{"],
        "submission.json": [b"[1]", b'{"output_dir": 3}', b'{"job_id": "x", "local": true}'],
        "log.txt": [b"\xff", b'{"epoch": 0, "test_acc1": NaN}', b'{"epoch": 0, "time": "x"}'],
    }
    files = [(name, text) for name, texts in wrong.items() for text in texts]
    for number, (name, text) in enumerate(files):
        make_run(Path(f"a/{number}"), [70.0])
        Path(f"a/{number}", name).write_bytes(text)
    Path("empty").mkdir()
    Path("file").touch()
    show_status(["empty", "a", "file"])
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["run", "run"]
    notes = shown.err.splitlines()
    assert re.match("note    there is no run in 'empty'", notes[0])
    for number, note in enumerate(notes[1:-1]):
        assert re.match(
            f"note    ('a/{number}' has files that no training|cannot read a/{number}/)", note
        )
    assert (len(notes), notes[-1]) == (len(files) + 2, "note    'file' is not a folder")


def test_sparkline():
    assert [sparkline(range(count)) for count in (0, 1, 8)] == ["", "▄", "▁▂▃▄▅▆▇█"]
    assert sparkline([0] * 200 + [1] * 200) == "▁" * 12 + "█" * 12  # thinned


@pytest.mark.parametrize("words", [[], ["nowhere"], ["--help"], ["empty"]])
def test_wrong_use_is_one_line(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert one_line_errors(lambda: run(["status", *words])) == 2
    message = "error: (usage|'nowhere' is not a folder|there is no run in 'empty').*\n"
    assert re.fullmatch(message, capsys.readouterr().err)
