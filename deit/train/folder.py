"""The output folder of a training: one training at a time, and none lost to another.

The process that writes there holds a lock file with its host and number. The kernel's lock on the
file says whether that process is alive, on this host and where the file system tells other hosts;
the file's text says whose it is. A lock that a killed process left behind is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from deit.errors import UserError, some
from deit.train import slurm

LAST = "checkpoint.pth"
BEST = "best_checkpoint{}.pth"
EPOCH_COPY = "checkpoint_{:04d}.pth"
LOG_FILE = "log.txt"
CONFIG_FILE = "config.json"
CURVES_FILE = "curves.png"
LOCK = "run.lock"

_CHECKPOINTS = ("checkpoint*.pth", "best*checkpoint*.pth")
_RECORDS = (LOG_FILE, CONFIG_FILE, CURVES_FILE, "wandb_id.txt")
_JOBS_THAT_WRITE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# A process cannot lock out itself: the folders in which it trains already.
_held: set[Path] = set()


def clear(folder: Path) -> None:
    """Remove what an earlier training has left in `folder`, and nothing else.

    Raises:
        UserError: a folder has the name of one of its files.
    """
    found = [path for pattern in (*_CHECKPOINTS, *_RECORDS) for path in folder.glob(pattern)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            raise UserError(f"{path} is a folder where a training writes a file: move it away")
    for path in found:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def check_unused(folder: Path, resume: str) -> None:
    """Raise UserError if a training that starts with `--resume RESUME` would replace results."""
    found = sorted({path.name for pattern in _CHECKPOINTS for path in folder.glob(pattern)})
    if resume == "auto":
        if LAST in found:
            return
    elif resume and Path(resume).expanduser().resolve().parent == folder.resolve():
        return
    else:
        # With --resume auto a log alone is what a training has that was killed in its first save.
        log = folder / LOG_FILE
        found += [log.name] if log.exists() and log.stat().st_size else []
    if found:
        go_on = "" if resume else "--resume auto goes on with it, "
        raise UserError(
            f"--output-dir {folder} holds a training ({some(found)}): {go_on}another --output-dir "
            "keeps it, --overwrite removes it"
        )


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The epochs in a folder's log.txt, without a last line that was cut short.

    Lines of other programs, which do not say their epoch, are left out.
    """
    path = folder / LOG_FILE
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if isinstance(record, dict) and isinstance(record.get("epoch"), int):
            records.append(record)
    return records


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Make `folder` and hold its lock. An empty folder that was made here is removed at the end.

    Raises:
        UserError: it cannot be made or written, or another process trains in it.
    """
    made = not folder.exists()
    path = folder.resolve() / LOCK
    if path in _held:
        raise UserError(f"--output-dir {folder} is in use by this very process")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
    except OSError as error:
        raise UserError(
            f"--output-dir {str(folder)!r} cannot be made or written: {error.strerror}"
        ) from error
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        path.unlink(missing_ok=True)
        file.close()
        if made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _lock(path: Path) -> IO[str]:
    """Take the lock; the open file that holds it."""
    with contextlib.ExitStack() as closing:
        file = closing.enter_context(path.open("a+", encoding="utf-8"))
        busy = _is_locked(file)
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
            return _lock(path)  # the owner has removed the file after it was opened here
        file.seek(0)
        try:
            owner = json.load(file)
        except ValueError:  # it was killed before it could write
            owner = {}
        owner = owner if isinstance(owner, dict) else {}
        if busy or (owner and _may_write(owner, without_locks=busy is None)):
            raise UserError(_in_use(path, owner))
        myself = {
            "host": platform.node(),
            "process": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        file.truncate(0)
        json.dump(myself, file)
        file.flush()
        os.fsync(file.fileno())
        closing.pop_all()
        return file


def _is_locked(file: IO[str]) -> bool | None:
    """Lock the file; True if another process has, None if this file system has no locks.

    Such a lock ends with its process, however that ends, and is not inherited by its children.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return True
    return False


def _may_write(owner: dict[str, Any], without_locks: bool) -> bool:
    """Whether the owner may be alive, where the kernel's lock does not say so.

    Another host's locks may not be seen here. Slurm starts a job again only after its earlier start
    has ended, and knows of other jobs.
    """
    if owner.get("host") == platform.node():
        return without_locks and owner["process"] != os.getpid() and is_alive(owner["process"])
    job = owner.get("slurm_job")
    if job is None or not shutil.which("scontrol"):
        return True
    if job == os.environ.get("SLURM_JOB_ID"):
        return False
    states = slurm.job_states(job)
    return not (states or slurm.has_forgotten(job)) or not _JOBS_THAT_WRITE.isdisjoint(states)


def is_alive(process: int) -> bool:
    """Whether there is a process of this number on this host."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _in_use(path: Path, owner: dict[str, Any]) -> str:
    job = f" (Slurm job {owner['slurm_job']})" if owner.get("slurm_job") else ""
    who = f"process {owner.get('process', '?')} on {owner.get('host', '?')}{job}"
    text = f"--output-dir {path.parent} is in use since {owner.get('started', '?')} by {who}"
    if owner and owner.get("host") != platform.node():
        return f"{text}: if that has ended, remove {path}; else use another folder"
    return f"{text}: stop that first, or use another folder"
