from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def resources(kernel: str, folder: Path) -> list[dict[str, str]]:
    """The rows that are printed for sm_90 and bfloat16."""
    pytest.importorskip("triton", minversion="3.3")
    command = [sys.executable, "-W", "ignore", "benchmarks/kernel_resources.py"]
    options = ["--target", "90", "--dtype", "bf16", "--kernel", kernel]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        command + options,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(folder)},
    )
    assert result.returncode == 0, result.stderr
    header, *rows = (line.split() for line in result.stdout.splitlines())
    return [dict(zip(header[-9:], row[-9:], strict=True)) for row in rows]


def test_prints_what_a_kernel_takes(tmp_path: Path) -> None:
    """One that multiplies: on tensor cores, nothing spilled, every load 16 bytes wide."""
    rows = resources("weight gradient", tmp_path)
    assert len(rows) >= 3
    for row in rows:
        assert (row["target"], row["stack"], row["product"]) == ("sm_90", "0", "HGMMA")
        assert 0 < int(row["registers"]) <= 255
        assert row["loads"] == row["wide_loads"] != "0"


@pytest.mark.parametrize(
    ("kernel", "sizes"), [("layer norm backward", 3), ("depthwise backward", 5)]
)
def test_nothing_is_spilled(kernel: str, sizes: int, tmp_path: Path) -> None:
    rows = resources(kernel, tmp_path)
    assert len(rows) == sizes
    assert {row["stack"] for row in rows} == {"0"}
    # half of a multiprocessor's memory at most: two programs fit
    assert all(int(row["shared"]) < 100_000 for row in rows)
