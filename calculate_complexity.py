"""Parameters, FLOPs, throughput and memory of the networks; `--help` lists the options."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler reports its every start

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent)

from deit.complexity.command import main
from deit.errors import one_line_errors

if __name__ == "__main__":
    sys.exit(one_line_errors(partial(main, sys.argv[1:])))
