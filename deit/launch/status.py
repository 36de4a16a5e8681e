"""`run_with_submitit.py status FOLDER ...`: how each run is doing.

Everything comes from the run's folder (log.txt, config.json, submission.json), except whether a
job is waiting or running, which Slurm is asked.
"""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deit.cli import duration
from deit.errors import UserError, one_line
from deit.train import slurm
from deit.train.folder import CONFIG_FILE, LOG_FILE, is_alive, read_log

RECORD = "submission.json"
START = "--- start"
"""Begins a start's part of the error log, which a requeued job goes on with."""
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 24
# Slurm's and Python's; srun's own lines only say that a process failed.
_ERROR = re.compile(r"error: |(\w+\.)*\w*(Error|Exception|Interrupt)\b|.*\b(oom|OOM|Killed)\b")
_GOING_ON = ("pending", "running", "completing", "configuring", "requeued", "suspended")
_RECENT = 5  # epochs that the time left is judged by


@dataclass(frozen=True)
class RunStatus:
    """What one line of the table shows; None where the run has not come so far."""

    name: str
    model: str | None
    state: str
    epoch: int
    epochs: int | None
    best: float | None  # top-1 in per cent
    seconds_left: float | None
    curve: str
    error: str | None = None
    """The last line about an error, of a run that has ended before its last epoch."""


def show_status(folders: Sequence[str]) -> None:
    """Print a table of the runs in `folders` (each a run, or a folder of runs).

    A folder without a run, or whose files are not understood, is a note on stderr.

    Raises:
        UserError: no folder, or no run in any.
    """
    if not folders or any(folder.startswith("-") for folder in folders):
        raise UserError("usage: run_with_submitit.py status FOLDER ...")
    rows = [("run", "model", "state", "epoch", "best top-1", "time left", "top-1")]
    errors: list[str] = []
    notes: list[str] = []
    for folder in map(Path, folders):
        with _noting(folder, notes):
            for path in find_runs(folder):
                with _noting(path, notes):
                    run = read_status(path)
                    rows.append(_row(run))
                    errors += [f"{run.name}  {run.error}"] if run.error else []
    if len(rows) == 1:
        raise UserError("; ".join(notes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    for line in errors:
        print(line)
    for note in notes:
        print(f"note    {note}", file=sys.stderr)


@contextlib.contextmanager
def _noting(folder: Path, notes: list[str]) -> Iterator[None]:
    """Add to `notes` what is wrong with `folder`, whatever somebody has written there."""
    try:
        yield
    except UserError as error:
        notes.append(str(error))
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        notes.append(f"{str(folder)!r} has files that no training wrote ({what})")


def _row(run: RunStatus) -> tuple[str, ...]:
    best = "-" if run.best is None else f"{run.best:.2f} %"
    left = "-" if run.seconds_left is None else duration(run.seconds_left)
    epoch = f"{run.epoch}/{run.epochs or '?'}"
    return (run.name, str(run.model or "-"), run.state, epoch, best, left, run.curve)


def find_runs(folder: Path) -> list[Path]:
    """`folder` if it holds a run, else those of its subfolders that do, sorted by name."""
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a folder")
    signs = (CONFIG_FILE, LOG_FILE, RECORD)
    for candidates in ([folder], sorted(folder.iterdir())):
        runs = [path for path in candidates if any((path / name).is_file() for name in signs)]
        if runs:
            return runs
    raise UserError(f"there is no run in {str(folder)!r} (no {', '.join(signs)})")


def read_status(folder: Path) -> RunStatus:
    """The status of the run in `folder`."""
    submission = _read_json(folder / RECORD)
    output = Path(submission.get("output_dir") or folder)
    args = _read_json(output / CONFIG_FILE).get("args") or {}
    log = read_log(output)
    epoch = log[-1]["epoch"] + 1 if log else 0
    epochs = args.get("epochs", submission.get("epochs"))
    scores = [record["test_acc1"] for record in log if "test_acc1" in record]
    times = [record["time"] for record in log if "time" in record][-_RECENT:]
    left, error = None, None
    if epochs is not None and epoch >= epochs:
        state = "finished"
    else:
        state = _state(submission, output)
        if epochs and times:
            left = (epochs - epoch) * statistics.median(times)
        if submission and state not in _GOING_ON:
            error = last_error(folder)
            state = "failed" if error and state == "stopped" else state
    return RunStatus(
        name=folder.name,
        model=args.get("model") or submission.get("name"),
        state=state,
        epoch=epoch,
        epochs=epochs,
        best=max(scores, default=None),
        seconds_left=left,
        curve=sparkline(scores),
        error=error,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def last_error(folder: Path) -> str | None:
    """The last line about an error in what the latest start of a job has left in `folder`."""
    logs = sorted(folder.glob("*_log.err"), key=lambda path: path.stat().st_mtime, reverse=True)
    for log in logs:
        latest = log.read_text(encoding="utf-8", errors="replace").rpartition(START)[2]
        errors = [line for line in latest.splitlines() if _ERROR.match(line)]
        if errors:
            return errors[-1]
    return None


def _state(submission: dict[str, Any], output: Path) -> str:
    """What an unfinished run is doing."""
    job_id = submission.get("job_id")
    if job_id is None:
        age = time.time() - max(path.stat().st_mtime for path in output.iterdir())
        return f"last written {duration(age)} ago"
    if submission.get("local"):
        return "running" if is_alive(int(job_id)) else "stopped"
    states = slurm.job_states(job_id)
    if not states:
        return f"job {job_id} unknown to Slurm"
    # Completed, but not all epochs: somebody asked it to stop.
    return "stopped" if states[0] == "COMPLETED" else states[0].lower()


def sparkline(values: Sequence[float], width: int = _CURVE_WIDTH) -> str:
    """`values` as a line of bars between their smallest and largest, evenly thinned to `width`."""
    if not values:
        return ""
    if len(values) > width:
        step = (len(values) - 1) / (width - 1)
        values = [values[round(index * step)] for index in range(width)]
    low, span = min(values), max(values) - min(values)
    top = len(_BARS) - 1
    return "".join(_BARS[round((v - low) / span * top) if span else top // 2] for v in values)
