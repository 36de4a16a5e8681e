"""Atomic and background writing: whatever fails, the old file survives."""

import os
import re
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch
from training_runs import run_processes

from deit.errors import one_line_errors
from deit.saving import CheckpointWriter, SaveError, atomic_path, snapshot, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_failed_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a", "old")

    def fail():
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("new, but not completely")
            raise OSError(28, "No space left on device")

    with pytest.raises(SaveError, match=r"no space left on .*previous file is unchanged"):
        fail()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"
    with pytest.raises(SaveError, match="folder is gone"):
        write_text(tmp_path / "absent" / "a", "text")


def test_a_crash_leaves_no_file_with_other_parts(tmp_path, monkeypatch):
    """As an ONNX file has, whose weights lie beside it."""
    replaced = os.replace

    def write(text):
        with atomic_path(tmp_path / "a.onnx") as temporary:
            temporary.write_text(text)
            temporary.with_name("a.onnx.data").write_text(text)

    def crash(source, target):
        if target.name == "a.onnx":
            raise KeyboardInterrupt
        replaced(source, target)

    write("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write("new")
    assert names(tmp_path) == ["a.onnx.data"]
    write("new")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"new"}
    assert names(tmp_path) == ["a.onnx", "a.onnx.data"]


def test_snapshot_is_deep_and_compact_and_reuses_memory_that_fits():
    base = torch.arange(100.0)
    first = snapshot({"a": [base[:2], torch.ones(2)], "b": (base[::50], 3)})
    base.zero_()
    assert first["a"][0].tolist() == [0.0, 1.0]
    assert first["b"][0].tolist() == [0.0, 50.0]
    assert first["a"][0].untyped_storage().nbytes() == 8
    assert first["b"][1] == 3
    new = {"a": [torch.ones(2), torch.zeros(4)], "c": torch.zeros(1), "b": 5}
    second = snapshot(new, first)
    assert second["a"][0] is first["a"][0]
    assert second["a"][0].tolist() == [1.0, 1.0]
    assert second["a"][1].shape == (4,)
    assert second["b"] == 5
    assert second["c"] is not new["c"]


def test_training_goes_on_while_a_file_is_written(monkeypatch, tmp_path):
    writer = CheckpointWriter(tmp_path)
    started, released = threading.Event(), threading.Event()
    save = torch.save

    def slow_save(*args):
        started.set()
        assert released.wait(120)
        save(*args)

    monkeypatch.setattr(torch, "save", slow_save)
    weights = torch.ones(3)
    writer.save({"model": weights}, ["last.pth"])
    assert started.wait(120)
    weights.zero_()  # training changes them while they are being written
    assert not (tmp_path / "last.pth").exists()
    released.set()
    writer.close()
    assert torch.load(tmp_path / "last.pth")["model"].sum() == 3


def save_too_much(folder: Path) -> int:
    """The kernel's limit on the size of a file acts as a full disk does, down in the C++ writer."""
    writer = CheckpointWriter(folder)
    writer.save({"model": torch.ones(3)}, ["last.pth"])
    writer.flush()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    writer.save({"model": torch.zeros(1_000_000)}, ["last.pth"])

    def train() -> None:
        while True:
            writer.check()

    return one_line_errors(train)


def test_too_large_a_file_surfaces_at_a_later_call(tmp_path):
    """And is called so, not by the names that torch's zip writer has for what follows from it."""
    out = tmp_path / "out"
    out.mkdir()
    [(status, output)] = run_processes([save_too_much], (out,), tmp_path, distributed=False)
    assert status == 2
    message = "error: cannot save .*the file would be larger than the system allows.*"
    assert re.fullmatch(message + "the previous file is unchanged\n", output), output
    assert names(out) == ["last.pth"]
    assert torch.load(out / "last.pth")["model"].sum() == 3
