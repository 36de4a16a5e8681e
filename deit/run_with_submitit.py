"""Start trainings on a Slurm cluster or on this machine, and look at how they are doing.

    python deit/run_with_submitit.py --recipe d2_deit_base_patch16_LS --data-path IMAGENET
    python deit/run_with_submitit.py --model deit_small_patch16_LS --batch 64 --nodes 1 ...
    python deit/run_with_submitit.py status runs/*

Takes every option of deit/main.py; docs/cluster.md has the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from deit.errors import UserError, run_command
from deit.launch.spec import make_spec
from deit.launch.status import show_status


def run(argv: Sequence[str]) -> None:
    """Carry out one command line (without the program's name)."""
    if argv and argv[0] == "status":
        show_status(argv[1:])
        return
    spec = make_spec(argv)
    if spec.asked.print_command:
        for task in spec.tasks:
            print(spec.command(task))
        return
    try:
        from deit.launch.submit import dry_run, submit
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        raise UserError("starting jobs needs the package submitit: pip install submitit") from None
    if spec.asked.dry_run:
        print(dry_run(spec))
    else:
        submit(spec)


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(sys.argv[1:])))
