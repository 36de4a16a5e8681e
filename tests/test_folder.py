"""One training a folder at a time, and none that replaces another by accident."""

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
from torch.utils.tensorboard import SummaryWriter
from training_runs import differences, load, make_images, train

import deit.train.reporting
from deit.errors import UserError
from deit.train import slurm
from deit.train.folder import LOCK, check_unused, claim, clear

REPOSITORY = Path(__file__).resolve().parents[1]


def listed(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# results


def test_a_second_training_does_not_replace_the_first(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert train("--epochs", "1", data=data, out=out) == 0
    (out / "notes.txt").write_text("mine")
    before = {name: (out / name).stat().st_mtime_ns for name in listed(out)}
    capsys.readouterr()
    other = tmp_path / "other.pth"
    other.write_bytes((out / "checkpoint.pth").read_bytes())
    for argv in ((), ("--finetune", str(other)), ("--resume", str(other))):
        assert train("--epochs", "1", *argv, data=data, out=out) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "holds a training (best_checkpoint.pth, checkpoint.pth, log.txt)" in error
        assert "--overwrite" in error
        assert ("--resume auto" in error) == ("--resume" not in argv)
    assert {name: (out / name).stat().st_mtime_ns for name in listed(out)} == before
    # going on with it is no replacement
    assert train("--resume", str(out / "checkpoint.pth"), data=data, out=out) == 0
    assert load(out / "checkpoint.pth")["epoch"] == 1
    (out / "checkpoint_0007.pth").touch()
    assert train("--epochs", "1", "--overwrite", data=data, out=out) == 0
    assert load(out / "checkpoint.pth")["epoch"] == 0
    assert len((out / "log.txt").read_text().splitlines()) == 1
    assert "notes.txt" in listed(out)
    assert "checkpoint_0007.pth" not in listed(out)
    assert LOCK not in listed(out)


def test_a_folder_with_the_name_of_a_file_is_not_removed(tmp_path):
    (tmp_path / "log.txt").write_text("kept")
    for name in ("curves.png", "checkpoint_0001.pth"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=f"{name} is a folder"):
            clear(tmp_path)
        (tmp_path / name).rmdir()
    assert listed(tmp_path) == ["log.txt"]


def test_what_counts_as_results(tmp_path):
    check_unused(tmp_path, "")
    (tmp_path / "config.json").touch()
    (tmp_path / "log.txt").touch()
    check_unused(tmp_path, "")  # a training that was killed before it had anything
    (tmp_path / "log.txt").write_text("{}\n")
    check_unused(tmp_path, "auto")
    with pytest.raises(UserError, match=r"log\.txt"):
        check_unused(tmp_path, "")
    (tmp_path / "best_checkpoint.pth").touch()
    with pytest.raises(UserError, match="best_checkpoint"):
        check_unused(tmp_path, "auto")  # there is nothing to go on from, but something to lose
    check_unused(tmp_path, str(tmp_path / "best_checkpoint.pth"))
    (tmp_path / "checkpoint.pth").touch()
    check_unused(tmp_path, "auto")
    (tmp_path / "teacher.pth").touch()
    clear(tmp_path)
    assert listed(tmp_path) == ["teacher.pth"]


# the lock

CLAIM = """
import os, sys
from pathlib import Path
from deit.errors import one_line_errors
from deit.train.folder import claim

def body():
    with claim(Path(sys.argv[1])):
        os.kill(os.getpid(), int(sys.argv[2]))

sys.exit(one_line_errors(body))
"""


def claim_elsewhere(folder, number: int = 0) -> subprocess.CompletedProcess[str]:
    """Another process claims the folder and sends itself that signal."""
    command = [sys.executable, "-c", CLAIM, str(folder), str(int(number))]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_another_process_is_refused_while_one_trains(tmp_path):
    out = tmp_path / "out"
    with claim(out):
        refused = claim_elsewhere(out)
        assert refused.returncode == 2
        owner = rf"in use since 2.* by process {os.getpid()} on .*: stop that"
        assert re.search(owner, refused.stderr)
        with pytest.raises(UserError, match="this very process"), claim(out):
            pass
        assert listed(out) == [LOCK]
    assert not out.exists()  # it was made here, and is empty
    assert claim_elsewhere(out).returncode == 0


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    assert claim_elsewhere(tmp_path, signal.SIGKILL).returncode == -signal.SIGKILL
    assert LOCK in listed(tmp_path)
    with claim(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert LOCK not in listed(tmp_path)


HERE = platform.node()


@pytest.mark.parametrize(
    ("owner", "locks", "refused"),
    [
        ({}, True, "process 1 on elsewhere: if that has ended, remove .*run.lock"),
        ({"slurm_job": "7"}, True, None),  # this job, which Slurm has started once more
        ({"slurm_job": "8"}, True, r"\(Slurm job 8\)"),  # it runs
        ({"slurm_job": "9"}, True, None),  # its node failed
        ({"slurm_job": "6"}, True, None),  # Slurm has forgotten it
        ({"host": HERE, "process": os.getppid()}, True, None),
        # where the file system has no locks
        ({"host": HERE, "process": os.getppid()}, False, f"process {os.getppid()} on {HERE}: stop"),
        ({"host": HERE, "process": 2**22 + 1}, False, None),  # more than there can be
    ],
)
def test_a_lock_that_was_left(owner, locks, refused, tmp_path, monkeypatch):
    states = {"8": ["RUNNING"], "9": ["NODE_FAIL"]}
    monkeypatch.setattr(slurm, "job_states", lambda job: states.get(job, []))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if not locks:
        monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(errno.ENOLCK, "No locks")))
    known = {"host": "elsewhere", "process": 1, "slurm_job": None, "started": "then"}
    (tmp_path / LOCK).write_text(json.dumps(known | owner))
    with pytest.raises(UserError, match=refused) if refused else nullcontext(), claim(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


# failures after the last update of an epoch


def test_an_unreadable_test_image_loses_no_epoch(data, tmp_path, capsys):
    folder = make_images(tmp_path / "data")
    path = folder / "val" / "class1" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    out = tmp_path / "out"
    assert train(data=folder, out=out) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert f"the last state is {out / 'checkpoint.pth'}, --resume auto goes on" in error
    assert load(out / "checkpoint.pth")["step"] == 6
    path.write_bytes(whole)
    assert train("--resume", "auto", data=folder, out=out) == 0
    assert train(data=folder, out=tmp_path / "whole") == 0
    one, other = (load(each / "checkpoint.pth") for each in (out, tmp_path / "whole"))
    assert differences(one, other) == []


def test_boards_and_curves_that_fail_do_not_end_the_training(data, tmp_path, monkeypatch, capsys):
    fail = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    monkeypatch.setattr(deit.train.reporting, "draw_curves", fail)
    assert train("--epochs", "1", data=data, out=tmp_path) == 0
    output = capsys.readouterr().out
    assert output.count("TensorBoard failed, the training goes on without it: [Errno 28]") == 1
    assert "no curves: [Errno 28]" in output
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 0


def test_a_log_that_cannot_be_written_says_where_to_go_on(data, tmp_path, monkeypatch, capsys):
    written = deit.train.reporting.write_text

    def write(path, text):
        written(path / "x" if path.name == "log.txt" and text else path, text)

    with monkeypatch.context() as patch:
        patch.setattr(deit.train.reporting, "write_text", write)
        assert train("--epochs", "1", data=data, out=tmp_path) == 2
    error = capsys.readouterr().err
    assert "log.txt" in error
    assert "--resume auto goes on from it" in error
    assert train("--epochs", "1", "--resume", "auto", data=data, out=tmp_path) == 0
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 0
