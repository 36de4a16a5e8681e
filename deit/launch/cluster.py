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


def _option(default: Any, metavar: str, help: str, kind: type = str) -> Any:
    """A field of `Resources` that the launcher has an option for."""
    return field(default=default, metadata={"metavar": metavar, "help": help, "type": kind})


@dataclass(frozen=True)
class Resources:
    """What a run asks Slurm for. `None` leaves the choice to the cluster's own default."""

    nodes: int = _option(2, "N", "nodes; with a recipe as many as its GPUs fill", int)
    ngpus: int = _option(8, "N", "processes a node, one a GPU", int)
    tgpu: str = _option(
        "A100", "TYPE", f"GPU type, '{UNTYPED_GPU}' for untyped, '{NO_GPU}' for CPU runs"
    )
    job_name: str | None = _option(
        None, "NAME", "name of the job; the recipe's or the model's without"
    )
    time: str = _option(
        "0-72:00:00", "D-HH:MM:SS", "time limit; a run that needs more goes on by itself"
    )
    partition: str | None = _option(None, "NAME", "Slurm partition")
    account: str | None = _option(None, "NAME", "account to charge")
    qos: str | None = _option(None, "NAME", "quality of service")
    constraint: str | None = _option(None, "FEATURES", "features that the nodes must have")
    cpus_per_task: int | None = _option(
        None, "N", "CPUs a process; unset, as many as --num-workers", int
    )
    mem: str | None = _option(None, "SIZE", "memory a node, such as 64G; 0 is all of it")
    mail_user: str | None = _option(None, "ADDRESS", "whom Slurm writes to")
    mail_type: str | None = _option(None, "EVENTS", "about what, such as END,FAIL")
    comment: str | None = _option(None, "TEXT", "comment on the job")
    signal_delay: int = _option(
        120, "SECONDS", "how long before the time limit to save and requeue", int
    )
    setup: list[str] = field(default_factory=list, metadata={"type": list})
    """Shell lines before the training starts."""
    sbatch: dict[str, Any] = field(default_factory=dict, metadata={"type": dict})
    """Further options of sbatch, as they are."""

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
    kinds = {entry.name: entry.metadata["type"] for entry in fields(Resources)}
    check_keys(table, {*kinds, "options", "job_dir"}, f"cluster file {file}")
    for name, value in table.items():
        kind = kinds[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(
                f"cluster file {file}: {name} = {value!r} should be a {kind.__name__} "
                f"(int: no quotes, str: in quotes, list: [...], dict: a table)"
            )
    return ClusterFile(file, table, options, job_dir)
