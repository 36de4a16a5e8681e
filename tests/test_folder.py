"""One training a folder at a time, and none that replaces another by accident."""

import errno
import fcntl
import functools
import json
import os
import platform
import re
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
from torch.utils.tensorboard import SummaryWriter
from training_runs import load, refused, run, run_processes, train

import deit.train.reporting
from deit.errors import UserError, one_line_errors
from deit.train import slurm
from deit.train.folder import LOCK, check_unused, claim, clear, read_log


def listed(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# results


def test_a_second_training_does_not_replace_the_first(data, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.pth"
    assert train("--epochs", "1", data=data, out=out) == 0
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    other.write_bytes((out / "checkpoint.pth").read_bytes())
    for argv in ((), ("--finetune", other), ("--resume", other)):
        error = refused("--epochs", "1", *argv, data=data, out=out)
        assert "holds a training (best_checkpoint.pth, checkpoint.pth, log.txt)" in error
        assert "--overwrite" in error
        assert ("--resume auto" in error) == ("--resume" not in argv)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    # going on with it is no replacement
    assert train("--resume", str(out / "checkpoint.pth"), data=data, out=out) == 0
    assert load(out / "checkpoint.pth")["epoch"] == 1
    for name in ("checkpoint_0007.pth", "tensorboard/old"):
        (out / name).touch()
    assert train("--epochs", "1", "--overwrite", data=data, out=out) == 0
    assert load(out / "checkpoint.pth")["epoch"] == 0
    assert len(read_log(out)) == 1
    assert listed(out) == sorted(before)
    assert not (out / "tensorboard" / "old").exists()


def test_a_folder_with_the_name_of_a_file_is_not_removed(tmp_path):
    (tmp_path / "log.txt").write_text("kept")
    for name in ("curves.png", "checkpoint_0001.pth"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=f"{name} is a folder"):
            clear(tmp_path)
        (tmp_path / name).rmdir()
    assert listed(tmp_path) == ["log.txt"]


@pytest.mark.parametrize(
    ("files", "resume", "lost"),
    [
        ({}, "", None),
        # a training that was killed before it had anything
        ({"config.json": "{}", "log.txt": ""}, "", None),
        ({"log.txt": "{}\n"}, "auto", None),
        ({"log.txt": "{}\n"}, "", r"log\.txt"),
        # there is nothing to go on from, but something to lose
        ({"best_checkpoint.pth": ""}, "auto", "best_checkpoint"),
        ({"best_checkpoint.pth": ""}, "{folder}/best_checkpoint.pth", None),
        ({"best_checkpoint.pth": "", "checkpoint.pth": ""}, "auto", None),
        ({"teacher.pth": ""}, "", None),
    ],
)
def test_what_counts_as_results(files, resume, lost, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=lost) if lost else nullcontext():
        check_unused(tmp_path, resume.format(folder=tmp_path))
    clear(tmp_path)
    assert listed(tmp_path) == [name for name in files if name == "teacher.pth"]


def test_a_link_that_leads_nowhere_is_no_fresh_start(data, tmp_path):
    (tmp_path / "checkpoint.pth").symlink_to("gone.pth")
    (tmp_path / "best_checkpoint.pth").touch()
    error = refused("--resume", "auto", data=data, out=tmp_path)
    assert "no checkpoint at" in error
    assert listed(tmp_path) == ["best_checkpoint.pth", "checkpoint.pth"]


# the lock


def hold(folder: Path, number: int) -> None:
    with claim(folder):
        os.kill(os.getpid(), number)


def claim_elsewhere(folder: Path, number: int = 0) -> tuple[int, str]:
    """Another process claims the folder and sends itself that signal."""
    body = functools.partial(one_line_errors, functools.partial(hold, folder, number))
    [done] = run_processes([body], (), folder.parent, distributed=False)
    return done


def test_another_process_is_refused_while_one_trains(tmp_path):
    out = tmp_path / "out"
    with claim(out):
        status, told = claim_elsewhere(out)
        assert status == 2
        assert re.search(rf"in use since 2.* by process {os.getpid()} on .*: stop that", told)
        with pytest.raises(UserError, match="this very process"), claim(out):
            pass
        assert listed(out) == [LOCK]
    assert not out.exists()  # it was made here, and is empty
    assert claim_elsewhere(out) == (0, "")


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert claim_elsewhere(out, signal.SIGKILL) == (-signal.SIGKILL, "")
    assert listed(out) == [LOCK]
    with claim(out):
        assert json.loads((out / LOCK).read_text())["process"] == os.getpid()
    assert listed(out) == []


HERE = platform.node()


@pytest.mark.parametrize(
    ("owner", "locks", "refused"),
    [
        ({}, True, "process 1 on elsewhere: if that has ended, remove .*run.lock"),
        ({"slurm_job": "7"}, True, None),  # this job, which Slurm has started once more
        ({"slurm_job": "8"}, True, r"\(Slurm job 8\)"),  # it runs
        ({"slurm_job": "9"}, True, None),  # its node failed
        ({"slurm_job": "6"}, True, None),  # Slurm has forgotten it
        ({"slurm_job": "5"}, True, r"\(Slurm job 5\)"),  # Slurm does not answer
        (5, True, None),  # nothing that a training writes
        ({"host": HERE, "process": os.getppid()}, True, None),
        # where the file system has no locks
        ({"host": HERE, "process": os.getppid()}, False, f"process {os.getppid()} on {HERE}: stop"),
        ({"host": HERE, "process": 2**22 + 1}, False, None),  # more than there can be
    ],
)
def test_a_lock_that_was_left(owner, locks, refused, tmp_path, monkeypatch):
    states = {"7": ["RUNNING"], "8": ["RUNNING"], "9": ["NODE_FAIL"]}
    monkeypatch.setattr(slurm, "job_states", lambda job: states.get(job, []))
    monkeypatch.setattr(slurm, "has_forgotten", lambda job: job == "6")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if not locks:
        monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(errno.ENOLCK, "No locks")))
    known = {"host": "elsewhere", "process": 1, "slurm_job": None, "started": "then"}
    text = json.dumps(known | owner if isinstance(owner, dict) else owner)
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(UserError, match=refused) if refused else nullcontext(), claim(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


# what is written beside checkpoints


def test_boards_and_curves_that_fail_do_not_end_the_training(data, tmp_path, monkeypatch):
    fail = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    monkeypatch.setattr(deit.train.reporting, "draw_curves", fail)
    output = run("--epochs", "1", data=data, out=tmp_path)
    assert output.count("TensorBoard failed, the training goes on without it: [Errno 28]") == 1
    assert "no curves: [Errno 28]" in output
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 0


def test_a_log_that_cannot_be_written_says_where_to_go_on(data, tmp_path, monkeypatch):
    written = deit.train.reporting.write_text

    def write(path, text):
        written(path / "x" if path.name == "log.txt" and text else path, text)

    with monkeypatch.context() as patch:
        patch.setattr(deit.train.reporting, "write_text", write)
        error = refused("--epochs", "1", data=data, out=tmp_path)
    assert "log.txt" in error
    assert "--resume auto goes on from it" in error
    assert train("--epochs", "1", "--resume", "auto", data=data, out=tmp_path) == 0
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 0
