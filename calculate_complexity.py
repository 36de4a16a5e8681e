"""Parameters, FLOPs, throughput and memory of the networks; `--help` lists the options."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent)

from deit.commands import complexity

if __name__ == "__main__":
    sys.exit(complexity())
