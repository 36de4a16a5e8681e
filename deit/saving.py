"""Files that survive a crash: atomic writes, and a writer that saves while training goes on.

A file is written under a temporary name in its own folder, flushed to the disk, and renamed over
the old one. Whatever happens before the rename leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import errno
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

_TEMPORARY = ".{name}.{pid}.tmp"
_FULL = {
    errno.ENOSPC: "no space left on",
    errno.EDQUOT: "no space left in the quota of",
    errno.EFBIG: "the file would be larger than the system allows in",
}


class SaveError(UserError):
    """A file could not be written; its previous version is unchanged."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it replaces `path`, on failure it goes.

    Raises:
        SaveError: the folder cannot be written, or the disk or the quota is full.
    """
    path = Path(path)
    temporary = path.with_name(_TEMPORARY.format(name=path.name, pid=os.getpid()))
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeErrors
        raise SaveError(_why_unwritten(path, error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_files(path: str | Path) -> Iterator[Path]:
    """As `atomic_path`, for writers that need the file's own name or put others beside it.

    Yields a path of that name in a temporary folder beside `path`. On success all files that are
    there move to the folder of `path`, that file last; on failure they go.

    Raises:
        SaveError: the folder cannot be written, or the disk or the quota is full.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            files = sorted(Path(folder).iterdir(), key=lambda file: file == temporary)
            for file in files:
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
                os.replace(file, path.parent / file.name)
            _sync_folder(path.parent)
    except OSError as error:
        raise SaveError(_why_unwritten(path, error)) from error


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def clean_temporaries(folder: Path) -> None:
    """Remove what writes that were killed half-way left in `folder`.

    Only for the one process that writes there, before it writes.
    """
    for leftover in folder.glob(_TEMPORARY.format(name="*", pid="*")):
        leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Some network file systems cannot sync folders and need not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _why_unwritten(path: Path, error: Exception) -> str:
    kept = "the previous file is unchanged" if path.exists() else "there is no previous file"
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return f"cannot save {str(path)!r}: the folder is gone ({one_line(error)})"
    # torch's zip writer hides the system's error behind one of its own.
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    numbers = {cause.errno for cause in causes if isinstance(cause, OSError)}
    reason = next((text for number, text in _FULL.items() if number in numbers), None)
    reason = f"{reason} {str(path.parent)!r}" if reason else one_line(error)[:160]
    return f"cannot save {str(path)!r}: {reason} ({free / 2**20:,.0f} MiB free); {kept}"


def snapshot(value: Any, reuse: Any = None) -> Any:
    """A deep copy of nested containers with every tensor in its own, compact host memory.

    Args:
        reuse: an earlier snapshot, whose memory is overwritten where the tensors match: fresh
            memory costs several times the copying.
    """
    if isinstance(value, Tensor):
        fits = isinstance(reuse, Tensor) and (reuse.shape, reuse.dtype) == (
            value.shape,
            value.dtype,
        )
        if fits:
            return reuse.copy_(value.detach())
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        old = reuse if isinstance(reuse, Mapping) else {}
        return {key: snapshot(item, old.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        fits = isinstance(reuse, list | tuple) and len(reuse) == len(value)
        old = reuse if fits else [None] * len(value)
        return type(value)(map(snapshot, value, old))
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

        The names appear in the given order, so the one that a resumed run reads comes last: then
        it never exists without those that belong to it.
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
        last = names[-1]
        with atomic_path(self.folder / last) as written:
            with written.open("wb") as file:  # of Python, whose errors say what was wrong
                torch.save(dict(state), file)
            for name in names[:-1]:
                with atomic_path(self.folder / name) as temporary:
                    _link(written, temporary)


def _link(source: Path, target: Path) -> None:
    """A second name for `source`, or a copy where the file system has no hard links.

    Sharing is safe, as these files are only ever replaced, never changed in place.
    """
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
