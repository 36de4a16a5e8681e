"""benchmarks/gpu.py on a CPU: rows of every part, what is kept, skipped and refused."""

import json
import time

import pytest
import torch

from benchmarks import gpu, gpu_tables
from benchmarks.gpu_jobs import PARTS, networks
from deit.errors import UserError


def soon() -> float:
    """When a process must have started and answered, on the busiest of machines."""
    return time.monotonic() + 300


QUICK = ["--device", "cpu", "--quick", "--seconds", "0", "--minutes", "9"]


def rows_of(folder):
    return [json.loads(line) for line in (folder / gpu.ROWS).read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    assert gpu.main([*QUICK, "--output", str(folder)]) == 0
    return folder


def test_rows_of_every_part(folder):
    rows = rows_of(folder)
    finished = [(row["part"], row["name"]) for row in rows if "finished_s" in row]
    assert finished == [(part, name) for part in PARTS for name in networks(part, quick=True)]
    assert {row["what"] for row in rows if "speed" in row} == {"inference", "training"}
    assert all(row["speed"] > 0 for row in rows if "speed" in row)
    errors = [row for row in rows if row.get("what") == "errors"]
    for row in errors:
        assert row["ours float32"]["logits"] < 1e-5 < row["ours bfloat16"]["logits"] < 0.1
        assert row["ours float32"]["gradients"] < 1e-4 < row["ours bfloat16"]["gradients"] < 0.3
    assert len(errors) == 6
    assert next(row for row in rows if row["part"] == "conditions")["versions"]["torch"]


def test_report_of_partial_results(folder, tmp_path, capsys):
    whole = (folder / "report.md").read_text()
    assert all(f"## {title}" in whole for title in ("Rates", "Relative", "Profiles", "Two epochs"))
    lines = (folder / gpu.ROWS).read_text()
    cut = lines[
        : lines.index('"ours bfloat16"') + 3
    ]  # in the middle of a line, as a kill leaves it
    (tmp_path / gpu.ROWS).write_text(cut)
    assert gpu.main(["--report", str(tmp_path)]) == 0
    assert "Rates and peak memory" in (tmp_path / "report.md").read_text()
    assert "Relative errors" not in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    # what was finished is not measured again, and the cut line costs its own job alone
    resumed = [*QUICK, "--output", str(tmp_path), "--parts", "vit", "exactness"]
    assert gpu.main(resumed) == 0
    text = (tmp_path / gpu.ROWS).read_text()
    assert text.startswith(cut + "\n")
    rows = gpu.read_rows(tmp_path / gpu.ROWS)
    finished = [(row["part"], row["name"]) for row in rows if "finished_s" in row]
    assert len(finished) == len(set(finished)) == 7


def test_what_there_is_no_time_for_is_skipped(tmp_path):
    short = [*QUICK, "--minutes", "0", "--output", str(tmp_path)]
    gpu.main(short)
    rows = rows_of(tmp_path)
    skipped = {row["part"] for row in rows if "skipped" in row}
    assert skipped == set(PARTS)
    assert "skipped, no time was left" in (tmp_path / "report.md").read_text()


def test_a_job_is_given_up_and_a_failure_costs_its_row(tmp_path):
    worker, rows = gpu.Worker(gpu.ROOT, tmp_path / "log"), gpu.Rows(tmp_path)
    job = {"checkout": "this", "part": "vit", "name": "d2_deit_none", "device": "cpu"}
    job |= {"quick": True, "compile_blocks": False}
    assert "given up" in worker.run({**job, "kind": "timing"}, rows, 0.0)
    try:
        for _ in range(2):  # the same process goes on
            error = worker.run({**job, "kind": "timing", "batch": 1}, rows, soon())
            assert "deit_none" in error
        process = worker._process
        process.kill()
        assert "ended with status" in worker.run({**job, "kind": "timing"}, rows, soon())
    finally:
        worker.close()
    assert not rows.rows


def test_wrong_options_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, message in (
        ([], "there is no CUDA device: only --device cpu --quick"),
        (["--device", "cpu"], "add --quick"),
        ([*QUICK, "--against", str(tmp_path)], "no checkout"),
        (["--report", str(tmp_path / "none")], "no results"),
    ):
        with pytest.raises(UserError, match=message):
            gpu.main([*words, *([] if "--report" in words else ["--output", str(tmp_path / "x")])])
    gpu.Rows(tmp_path).add(dict(part="run", device="cuda", quick=False, compile_blocks=False))
    with pytest.raises(UserError, match="other settings"):
        gpu.main([*QUICK, "--output", str(tmp_path)])


def test_an_empty_report_is_drawn():
    assert gpu_tables.report([]) == "# Networks beside their ordinary twins\n"
    assert len(gpu_tables.draw([]).axes) == 1
