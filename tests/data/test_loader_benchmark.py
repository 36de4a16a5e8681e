"""benchmarks/loader.py runs, with and without workers, and reports both loaders."""

import json

import pytest
import torch

from benchmarks import loader


@pytest.mark.parametrize("workers", [0, 1])
def test_reports_both_loaders(tmp_path, workers, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(loader.time, "sleep", lambda seconds: None)
    words = f"--images 12 --size 32 --batch-size 4 --rounds 2 --workers {workers}"
    assert loader.main([*words.split(), "--output", str(tmp_path / "result.json")]) == 0
    report = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    rates, costs = report["images_per_second_per_core"], report["cpu_ms_per_image"]
    assert set(rates) == set(costs) == {"ours", "timm"}
    assert all(rate > 0 for rate in rates.values())
    assert all(cost >= 0 for cost in costs.values())
    assert report["settings"]["workers"] == str(workers)
    assert f"ours / timm: {report['ratio']:.3f}" in capsys.readouterr().out
