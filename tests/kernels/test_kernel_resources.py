from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_prints_what_a_kernel_takes(tmp_path: Path) -> None:
    """One that multiplies: on tensor cores, nothing spilled, every load 16 bytes wide."""
    pytest.importorskip("triton", minversion="3.3")
    command = [sys.executable, "-W", "ignore", "benchmarks/kernel_resources.py"]
    options = ["--target", "90", "--dtype", "bf16", "--kernel", "weight gradient"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        command + options,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    header, *rows = (line.split() for line in result.stdout.splitlines())
    assert len(rows) >= 3
    for row in rows:
        named = dict(zip(header[-9:], row[-9:], strict=True))
        assert (named["target"], named["stack"], named["product"]) == ("sm_90", "0", "HGMMA")
        assert 0 < int(named["registers"]) <= 255
        assert named["loads"] == named["wide_loads"] != "0"
