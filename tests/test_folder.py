"""One training a folder at a time, and none that replaces another by accident."""

import errno
import fcntl
import json
import os
import re
import signal

import pytest
from training_runs import differences, load, make_images, run_processes, train

import deit.main
import deit.train.folder
from deit.errors import UserError
from deit.train.folder import LOCK, check_unused, claim, clear
from deit.train.reporting import Reporter
from deit.train.stopping import request_stop


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data"))


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


@pytest.mark.parametrize("name", ["curves.png", "config.json", "checkpoint_0001.pth"])
def test_a_folder_with_the_name_of_a_file_is_not_removed(tmp_path, name):
    (tmp_path / "log.txt").write_text("kept")
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is a folder"):
        clear(tmp_path)
    assert (tmp_path / "log.txt").read_text() == "kept"


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


def hold_and_die(folder) -> None:
    with claim(folder):
        os.kill(os.getpid(), signal.SIGKILL)


def hold_and_report(folder) -> int:
    try:
        with claim(folder):
            return 0
    except UserError as error:
        print(error, flush=True)
        return 2


def test_another_process_is_refused_while_one_trains(tmp_path):
    out = tmp_path / "out"
    with claim(out):
        [(status, output)] = run_processes([hold_and_report], (out,), tmp_path, distributed=False)
        assert status == 2
        assert re.search(rf"in use since 2.* by process {os.getpid()} on .*: stop that", output)
        with pytest.raises(UserError, match="this very process"), claim(out):
            pass
        assert listed(out) == [LOCK]
    assert not out.exists()  # it was made here, and is empty
    [(status, _)] = run_processes([hold_and_report], (out,), tmp_path, distributed=False)
    assert status == 0


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    [(status, _)] = run_processes([hold_and_die], (tmp_path,), tmp_path, distributed=False)
    assert status == -signal.SIGKILL
    assert LOCK in listed(tmp_path)
    with claim(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert LOCK not in listed(tmp_path)


def leave_lock(folder, **owner) -> None:
    known = {"host": "elsewhere", "process": 1, "slurm_job": None, "started": "then"}
    (folder / LOCK).write_text(json.dumps(known | owner))


def test_the_lock_of_another_host(tmp_path):
    leave_lock(tmp_path)
    message = rf"process 1 on elsewhere: if that has ended, remove {tmp_path / LOCK}"
    with pytest.raises(UserError, match=message), claim(tmp_path):
        pass


def test_a_job_that_slurm_starts_again_elsewhere_goes_on(tmp_path, monkeypatch):
    """And one that Slurm says may still write is waited for."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    answers = "*8) echo JobState=RUNNING;; *9) echo JobState=NODE_FAIL;;"
    scontrol.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for job, free in (("7", True), ("8", False), ("9", True), ("6", True)):
        leave_lock(tmp_path, slurm_job=job)
        if free:
            with claim(tmp_path):
                pass
        else:
            with pytest.raises(UserError, match="Slurm job 8"), claim(tmp_path):
                pass


def test_without_locks_of_the_kernel_processes_count(tmp_path, monkeypatch):
    def lockf(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    host = deit.train.folder.platform.node()
    leave_lock(tmp_path, host=host, process=os.getppid())
    with pytest.raises(UserError, match=f"process {os.getppid()} on {host}"), claim(tmp_path):
        pass
    leave_lock(tmp_path, host=host, process=2**22 + 1)  # more than there can be
    with claim(tmp_path):
        pass


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="--output-dir"), claim(path):
            pass


# failures after the last update of an epoch


def bad_image(folder):
    path = folder / "val" / "class1" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    return path, whole


def test_an_unreadable_test_image_loses_no_epoch(data, tmp_path, capsys):
    folder = make_images(tmp_path / "data")
    path, whole = bad_image(folder)
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
    from torch.utils.tensorboard import SummaryWriter

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

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


def test_the_folder_is_free_after_a_stop(data, tmp_path, monkeypatch):
    def stop(self, epoch, done, *rest):
        request_stop("a test")

    monkeypatch.setattr(Reporter, "on_update", stop)
    assert train(data=data, out=tmp_path) == 0
    assert LOCK not in listed(tmp_path)
