"""A loader's worker that is killed ends a training with one line."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from deit.data import DeviceLoader
from deit.data.workers import worker_death
from tests.training_runs import make_images, train


@pytest.fixture(autouse=True)
def own_handler(monkeypatch):
    """torch's handler of SIGCHLD, which it sets once a process, and again what was there before."""
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


def test_killed_worker_ends_a_training_with_one_line(tmp_path, monkeypatch, capsys):
    def strike(self, batch):
        for worker in set(multiprocessing.active_children()) - before:
            os.kill(worker.pid, signal.SIGKILL)
        return finish(self, batch)

    finish = DeviceLoader._finish
    before = set(multiprocessing.active_children())
    monkeypatch.setattr(DeviceLoader, "_finish", strike)
    assert train("--num-workers", "1", data=make_images(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: DataLoader worker (pid")
    assert not set(multiprocessing.active_children()) - before


def test_a_connection_that_a_worker_closed_counts_as_its_death():
    here, there = multiprocessing.Pipe()
    there.close()
    with pytest.raises(EOFError) as closed:
        here.recv()
    assert worker_death(ConnectionResetError("of some other connection")) is None
    assert worker_death(RuntimeError("of some other kind")) is None
    signal.signal(signal.SIGCHLD, lambda *_: None)
    assert str(worker_death(closed.value)).startswith("DataLoader worker (pid unknown)")
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
