"""Atomic and background writing: whatever fails, the old file survives."""

import os
import threading
from pathlib import Path

import pytest
import torch
from training_runs import differences

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
    assert (tmp_path / "a.onnx.data").read_text() == "new", "the file itself comes last"
    write("new")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"new"}
    assert names(tmp_path) == ["a.onnx", "a.onnx.data"]


def test_training_goes_on_while_a_file_is_written(monkeypatch, tmp_path):
    writer = CheckpointWriter(tmp_path)
    started, released = threading.Event(), threading.Event()
    save = torch.save

    def slow_save(*args):
        started.set()
        assert released.wait(120)
        save(*args)

    monkeypatch.setattr(torch, "save", slow_save)
    weights = torch.ones(100_000)
    first = {"model": weights[:2], "more": [weights[::50_000], weights[:3]], "epoch": 3}
    writer.save(first, ["copy.pth", "last.pth"])
    assert started.wait(120)
    weights.zero_()  # training changes them while they are being written
    assert names(tmp_path) == [name for name in names(tmp_path) if name.startswith(".")]
    released.set()
    writer.flush()
    assert (tmp_path / "last.pth").stat().st_size < 10_000, "no more than the views' own values"
    # Memory is used once more where it fits.
    second = {"model": weights[:2], "more": [torch.ones(4)], "other": (weights[:1], 5)}
    writer.save(second, ["last.pth"])
    writer.close()
    kept, last = (torch.load(tmp_path / name) for name in ("copy.pth", "last.pth"))
    ones = {"model": torch.ones(2), "more": [torch.ones(2), torch.ones(3)], "epoch": 3}
    assert differences(kept, ones) == []
    assert differences(last, second) == []


def test_snapshots_take_over_memory_that_fits():
    """Fresh memory costs several times the copying."""
    first = snapshot({"a": [torch.ones(2)]})
    assert snapshot({"a": [torch.zeros(2)]}, first)["a"][0] is first["a"][0]


def test_a_write_that_failed_is_told_by_a_later_call(tmp_path):
    writer = CheckpointWriter(tmp_path / "absent")
    writer.save({}, ["last.pth"])
    with pytest.raises(SaveError, match="folder is gone"):  # noqa: PT012
        while True:
            writer.check()
