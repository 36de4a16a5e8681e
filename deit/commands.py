"""Console commands of an installed package; each is one of the scripts of a checkout."""

from __future__ import annotations

import os
import sys

from deit.errors import run_command


def evaluate() -> int:
    """`deit-evaluate`: `python deit/main.py --eval`."""
    from deit.main import command

    return command(["--eval", *sys.argv[1:]])


def complexity() -> int:
    """`deit-complexity`: `python calculate_complexity.py`."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported
    from deit.measure.command import main

    return run_command(main)


def equivariance() -> int:
    """`deit-equivariance`: `python test_equivariance.py`."""
    from deit.verify.cli import main

    return run_command(main)


def launch() -> int:
    """`deit-launch`: `python deit/run_with_submitit.py`."""
    from deit.run_with_submitit import run

    return run_command(lambda: run(sys.argv[1:]))


def export() -> int:
    """`deit-export`: `python deit/export.py`."""
    from deit.export import main

    return run_command(main)
