"""What to ask the cluster for, and the user's file of defaults for it (docs/cluster.md)."""

from __future__ import annotations

import argparse
import os
import re
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from deit.cli import CommandLine, OptionGroup, Options, number, read_toml
from deit.errors import UserError
from deit.launch.recipes import check_options, options_to_argv

DEFAULT_FILE = Path("~/.config/deit/cluster.toml")
FILE_VARIABLE = "DEIT_CLUSTER"
UNTYPED_GPU = "any"
NO_GPU = "none"
SBATCH_OPTIONS = ("partition", "account", "qos", "constraint", "mem", "mail_user", "mail_type",
                  "comment")  # fmt: skip
"""What sbatch gets as it is."""


def minutes(text: str) -> int:
    """An argparse type: a Slurm time (M, M:S, H:M:S, D-H, D-H:M or D-H:M:S) as minutes, rounded up.

    Raises:
        ArgumentTypeError: none of these forms, or no time at all.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not days-hours:minutes:seconds, e.g. 0-72:00:00"
        )
    days, *clock = (int(part or 0) for part in match.groups())
    if match[1] is None and match[4] is None:
        clock = [0, *clock[:2]]  # M and M:S
    hours, minute, second = clock
    total = ((days * 24 + hours) * 60 + minute) * 60 + second
    if total == 0:
        raise argparse.ArgumentTypeError(f"{text}: a run needs some time")
    return -(-total // 60)


# fmt: off
def add_cluster_options(parser: ArgumentParser) -> OptionGroup:
    """Add what a cluster file may say too. None stands for the cluster's own default."""
    count = number(int, low=1)
    cluster = OptionGroup(
        parser, "cluster", f"Your own defaults live in {DEFAULT_FILE} (docs/cluster.md).")
    cluster.add("--job-dir", str, "runs/%j", "DIR", "folder of the run, %j is the job's id")
    cluster.add("--nodes", count, 2, "N", "nodes; with a recipe as many as its GPUs fill")
    cluster.add("--ngpus", count, 8, "N", "processes a node, one a GPU")
    cluster.add("--tgpu", str, "A100", "TYPE",
                f"GPU type, '{UNTYPED_GPU}' for untyped, '{NO_GPU}' for CPU runs")
    cluster.add("--job-name", str, None, "NAME",
                "name of the job; the recipe's or the model's without")
    cluster.add("--time", minutes, "0-72:00:00", "D-HH:MM:SS",
                "time limit; a run that needs more goes on by itself")
    cluster.add("--partition", str, None, "NAME", "Slurm partition")
    cluster.add("--account", str, None, "NAME", "account to charge")
    cluster.add("--qos", str, None, "NAME", "quality of service")
    cluster.add("--constraint", str, None, "FEATURES", "features that the nodes must have")
    cluster.add("--cpus-per-task", count, None, "N",
                "CPUs a process; unset, as many as --num-workers")
    cluster.add("--mem", str, None, "SIZE", "memory a node, such as 64G; 0 is all of it")
    cluster.add("--mail-user", str, None, "ADDRESS", "whom Slurm writes to")
    cluster.add("--mail-type", str, None, "EVENTS", "about what, such as END,FAIL")
    cluster.add("--comment", str, None, "TEXT", "comment on the job")
    cluster.add("--signal-delay", number(int, low=0), 120, "SECONDS",
                "how long before the time limit to save and requeue")
    cluster.add("--setup", str, None, "LINE",
                "shell line before the training, such as 'module load CUDA'; may be repeated",
                nargs="+", action="extend")
    return cluster
# fmt: on


def read_cluster_file(path: str | None) -> tuple[Options, dict[str, Any]]:
    """The file at `path`, else $DEIT_CLUSTER, else ~/.config/deit/cluster.toml if there is one.

    Returns:
        The options of `add_cluster_options`, and as `sbatch` what else goes to sbatch. The options
        of deit/main.py.

    Raises:
        UserError: a file that was asked for does not exist, or one with keys or values that are
            not understood.
    """
    asked = path or os.environ.get(FILE_VARIABLE)
    file = Path(asked or DEFAULT_FILE).expanduser()
    table = read_toml(file, "cluster file") if asked or file.is_file() else {}
    options, sbatch = table.pop("options", {}), table.pop("sbatch", {})
    if not (isinstance(options, dict) and isinstance(sbatch, dict)):
        raise UserError(f"cluster file {file}: options and sbatch are tables, as in [sbatch]")
    check_options(options, f"cluster file {file}")
    parser = CommandLine(add_help=False)
    add_cluster_options(parser)
    try:
        defaults = parser.parse_args(options_to_argv(table, parser))
    except UserError as error:
        raise UserError(f"cluster file {file}: {error}") from None
    defaults.sbatch = sbatch
    return defaults, options
