"""A loader's worker that is killed ends a training with one line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deit.data.workers import worker_death

REPOSITORY = Path(__file__).resolve().parents[2]


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        if parent == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_killed_worker_ends_a_training_with_one_line(tmp_path):
    options = "--model d2_deit_tiny_patch16_LS --model-kwargs depth=1 --input-size 32 --threads 1"
    process = subprocess.Popen(
        [sys.executable, "deit/main.py", *options.split(), "--num-workers", "1"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if "step" in line:  # training is under way
                break
        (worker,) = children(process.pid)
        os.kill(worker, signal.SIGKILL)
        started = time.monotonic()
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert time.monotonic() - started < 60
    assert process.returncode == 2, stderr
    assert stderr.strip().splitlines()[-1].startswith("error: DataLoader worker (pid")
    assert "Traceback" not in stderr


def test_a_connection_that_a_worker_closed_counts_as_its_death():
    here, there = multiprocessing.Pipe()
    there.close()
    with pytest.raises(EOFError) as closed:
        here.recv()
    assert worker_death(ConnectionResetError("of some other connection")) is None
    assert worker_death(RuntimeError("of some other kind")) is None
    before = signal.getsignal(signal.SIGCHLD)
    try:
        assert str(worker_death(closed.value)).startswith("DataLoader worker (pid unknown)")
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)
