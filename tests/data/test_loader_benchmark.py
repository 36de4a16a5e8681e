"""benchmarks/loader.py runs, with and without workers, and reports both loaders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "loader.py"


@pytest.mark.parametrize("workers", [0, 1])
def test_reports_both_loaders(tmp_path, workers):
    output = tmp_path / "result.json"
    options = {"images": 24, "size": 32, "batch-size": 4, "rounds": 2, "workers": workers}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    result = subprocess.run(
        [sys.executable, SCRIPT, *arguments, f"--output={output}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text(encoding="utf-8"))
    rates, costs = report["images_per_second_per_core"], report["cpu_ms_per_image"]
    assert set(rates) == set(costs) == {"ours", "timm"}
    assert all(rate > 0 for rate in rates.values())
    assert all(cost >= 0 for cost in costs.values())
    assert report["settings"]["workers"] == str(workers)
    assert f"ours / timm: {report['ratio']:.3f}" in result.stdout
