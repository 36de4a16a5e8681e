"""What to ask the cluster for, and the user's file of defaults for it (docs/cluster.md)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from deit.cli import check_keys, read_toml
from deit.errors import UserError

DEFAULT_FILE = Path("~/.config/deit/cluster.toml")
FILE_VARIABLE = "DEIT_CLUSTER"
UNTYPED_GPU = "any"
NO_GPU = "none"


@dataclass(frozen=True)
class Resources:
    """What a run asks Slurm for. `None` leaves the choice to the cluster's own default."""

    nodes: int = 2
    ngpus: int = 8  # processes a node, one a GPU
    tgpu: str = "A100"  # GPU type, or UNTYPED_GPU, or NO_GPU
    time: str = "0-72:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    mail_user: str | None = None
    mail_type: str | None = None
    comment: str | None = None
    job_name: str | None = None
    signal_delay: int = 120  # seconds before the time limit at which the run is told to save
    setup: list[str] = field(default_factory=list)  # shell lines before the training starts
    sbatch: dict[str, Any] = field(default_factory=dict)  # further sbatch options, as they are

    def __post_init__(self) -> None:
        for name in ("nodes", "ngpus", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
        if self.signal_delay < 0:
            raise UserError(f"--signal-delay {self.signal_delay}: seconds, 0 or more")
        self.minutes()

    @property
    def processes(self) -> int:
        return self.nodes * self.ngpus

    @property
    def gres(self) -> str | None:
        """The generic resource a node must have: gpu:A100:8."""
        if self.tgpu == NO_GPU:
            return None
        kind = "" if self.tgpu == UNTYPED_GPU else f"{self.tgpu}:"
        return f"gpu:{kind}{self.ngpus}"

    def minutes(self) -> int:
        """The time limit in whole minutes, rounded up."""
        return parse_time(self.time)

    def describe(self) -> str:
        """`2 nodes x 8 A100`, for people."""
        kind = {NO_GPU: "CPU processes", UNTYPED_GPU: "GPUs"}.get(self.tgpu, self.tgpu)
        return f"{self.nodes} node{'s' if self.nodes > 1 else ''} x {self.ngpus} {kind}"


_FIELD_TYPES = {
    "nodes": int,
    "ngpus": int,
    "cpus_per_task": int,
    "signal_delay": int,
    "setup": list,
    "sbatch": dict,
}


@dataclass(frozen=True)
class ClusterFile:
    """A user's defaults; `resources` has the names of `Resources`, `options` deit/main.py's."""

    path: Path | None = None
    resources: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    job_dir: str | None = None


def parse_time(text: str) -> int:
    """Minutes, rounded up, of a Slurm time: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        UserError: none of these forms, or no time at all.
    """
    match = re.fullmatch(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})", text.strip())
    if match is None:
        raise UserError(f"--time {text}: give days-hours:minutes:seconds, e.g. 0-72:00:00")
    parts = [int(part) for part in match["rest"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    total = ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UserError(f"--time {text}: a run needs some time")
    return -(-total // 60)


def load_cluster_file(path: str | None = None) -> ClusterFile:
    """The file at `path`, else $DEIT_CLUSTER, else ~/.config/deit/cluster.toml if there is one.

    Raises:
        UserError: a file that was asked for does not exist, or one with keys or values that are
            not understood.
    """
    asked = path or os.environ.get(FILE_VARIABLE)
    file = Path(asked or DEFAULT_FILE).expanduser()
    if not asked and not file.is_file():
        return ClusterFile()
    table = read_toml(file, "cluster file")
    options = table.pop("options", {})
    job_dir = table.pop("job_dir", None)
    known = {f.name for f in fields(Resources)}
    check_keys(table, known | {"options", "job_dir"}, f"cluster file {file}")
    for name, value in table.items():
        kind = _FIELD_TYPES.get(name, str)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(
                f"cluster file {file}: {name} = {value!r} should be a {kind.__name__} "
                f"(int: no quotes, str: in quotes, list: [...], dict: a table)"
            )
    return ClusterFile(file, table, options, job_dir)
