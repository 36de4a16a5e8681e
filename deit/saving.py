"""Files that survive a crash: atomic writes, and a writer that saves while training goes on.

A file is written in a temporary folder beside its place, flushed to the disk, and renamed over
the old one. Whatever happens before the rename leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deit.errors import UserError, one_line

_FULL = {
    errno.ENOSPC: "no space left on",
    errno.EDQUOT: "no space left in the quota of",
    errno.EFBIG: "the file would be larger than the system allows in",
}


class SaveError(UserError):
    """A file could not be written; its previous version is unchanged."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a path of the same name, in a temporary folder beside `path`, to write to.

    On success all files that are there move to the folder of `path`, that file last. On failure
    they go. Parts of the file are those that have its name and more, such as `a.onnx.data`: before
    they move the old file goes, so that a crash leaves none rather than one with other parts.

    Raises:
        SaveError: the folder cannot be written, or the disk or the quota is full.
    """
    path = Path(path)
    names = {"prefix": f".{path.name}.", "suffix": ".tmp"}
    try:
        with tempfile.TemporaryDirectory(**names, dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            files = sorted(Path(folder).iterdir(), key=lambda file: file == temporary)
            for file in files:
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
            if any(file.name.startswith(f"{path.name}.") for file in files):
                path.unlink(missing_ok=True)
                _sync_folder(path.parent)
            for file in files:
                os.replace(file, path.parent / file.name)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__  # torch's zip writer has its own errors
        if cause is None:
            raise
        raise SaveError(_why_unwritten(path, cause)) from error


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def clean_temporaries(folder: Path) -> None:
    """Remove what writes that were killed half-way left in `folder`.

    Only for the one process that writes there, before it writes.
    """
    for leftover in folder.glob(".*.*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Some network file systems cannot sync folders and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _why_unwritten(path: Path, error: OSError) -> str:
    kept = "the previous file is unchanged" if path.exists() else "there is no previous file"
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return f"cannot save {str(path)!r}: the folder is gone ({one_line(error)})"
    reason = one_line(error)[:160]
    if error.errno in _FULL:
        reason = f"{_FULL[error.errno]} {str(path.parent)!r}"
    return f"cannot save {str(path)!r}: {reason} ({free / 2**20:,.0f} MiB free); {kept}"


def snapshot(value: Any, reuse: Any = None) -> Any:
    """A deep copy of nested containers with every tensor in its own, compact host memory.

    Args:
        reuse: an earlier snapshot, whose memory is overwritten where the tensors match: fresh
            memory costs several times the copying.
    """
    if isinstance(value, Tensor):
        if isinstance(reuse, Tensor) and reuse.shape == value.shape and reuse.dtype == value.dtype:
            return reuse.copy_(value.detach())
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        old = reuse if isinstance(reuse, Mapping) else {}
        return {key: snapshot(item, old.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        old = reuse if isinstance(reuse, list | tuple) else ()
        return type(value)(map(snapshot, value, itertools.chain(old, itertools.repeat(None))))
    return value


class CheckpointWriter:
    """Writes checkpoints into one folder in the background, one at a time.

    `save` returns as soon as the tensors are copied to host memory. A write that failed raises
    its `SaveError` at the next call of any method.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._copied: dict[str, Any] = {}

    def save(self, state: Mapping[str, Any], names: Sequence[str]) -> None:
        """Save `state` under each of `names` (one write; the others are links to it).

        The last name appears last. It is the one that a resumed run reads, and so never exists
        without those that belong to it.
        """
        self.flush()
        self._copied = snapshot(state, self._copied)
        self._pending = self._pool.submit(self._write, self._copied, tuple(names))

    def check(self) -> None:
        """Raise the error of a finished write, without waiting for an unfinished one."""
        if self._pending is not None and self._pending.done():
            self.flush()

    def flush(self) -> None:
        """Wait until everything is on the disk; raise the error of the last write."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """`flush`, and end the thread."""
        try:
            self.flush()
        finally:
            self._pool.shutdown()

    def _write(self, state: Mapping[str, Any], names: tuple[str, ...]) -> None:
        with atomic_path(self.folder / names[-1]) as written:
            with written.open("wb") as file:  # of Python, whose errors say what was wrong
                torch.save(dict(state), file)
            for name in names[:-1]:
                # Sharing is safe, as these files are only ever replaced, never changed in place.
                try:
                    os.link(written, written.with_name(name))
                except OSError:  # this file system has no hard links
                    shutil.copyfile(written, written.with_name(name))
