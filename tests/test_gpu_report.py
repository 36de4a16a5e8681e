from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_checks import CASES, Case, check_operation
from benchmarks.gpu_report import FIRST_GUESS, PARTS, Report
from benchmarks.gpu_timing import NETWORKS, Row, paired_ratio
from deit.complexity.published import PUBLISHED
from deit.complexity.timing import Timing

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_report.py"), *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OUT": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def test_rehearsal_runs_every_part(tmp_path: Path) -> None:
    result = run("--rehearse", "--seconds", "0.01", "--output", str(tmp_path / "new"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert not report["failed"]
    assert not report["skipped"]
    assert len(report["checks"]) > 20
    assert {row["part"] for row in report["rows"]} == set(PARTS) - {"checks"}
    assert all(row["ratio"] > 0 for row in report["rows"])
    log = (tmp_path / "new" / "report.log").read_text()
    assert log == result.stdout
    assert not list((tmp_path / "new").glob(".*"))
    # the tables come last, in one piece
    last = [line.split()[0] for line in log.splitlines()[-len(report["rows"]) - 3 :]]
    assert last == ["part", *(row["part"] for row in report["rows"]), "skipped", log.split()[-2]]


def test_without_a_gpu_it_says_so() -> None:
    result = run()
    assert result.returncode == 2
    assert result.stderr == "error: there is no CUDA device: only --rehearse runs without one\n"


def test_has_all_published_networks_and_their_twins() -> None:
    assert {n.name for n in NETWORKS} == {p.name for p in PUBLISHED if p.kind == "equivariant"}


def test_a_wrong_operation_fails() -> None:
    def twice_off(x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype == torch.float64 else 1.01 * x

    right = Case("right", lambda x: 1.01 * x, ((3, 8),))
    assert check_operation(right, torch.float32, CPU).passed
    finding = check_operation(Case("wrong", twice_off, ((3, 8),)), torch.float32, CPU)
    assert not finding.passed
    assert finding.numbers["result"] == pytest.approx(0.01, rel=1e-3)
    assert str(finding).startswith("FAIL wrong")


def test_strided_cases_have_strides() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.stride())
        return x * 2

    check_operation(Case("strided", look, ((3, 8),), strided=True), torch.float32, CPU)
    assert (16, 1) in seen
    assert any(case.strided for case in CASES)


def test_ratio_is_of_neighbouring_samples() -> None:
    # both get slower alike, which the ratio of the medians would not show
    ordinary, ours = Timing((2.0, 4.0, 8.0)), Timing((1.0, 2.0, 4.0))
    assert paired_ratio(ordinary, ours) == (2.0, 0.0)
    assert paired_ratio(ordinary, Timing((1.0, 1.0, 1.0)))[0] == 4.0


def test_rows_say_whether_goals_are_met() -> None:
    row = Row("training", "x", 64, 100.0, 150.0, 1.5, 0.01, 1.4, memory_ratio=0.9)
    assert "1.500" in str(row)
    assert "goal 1.40 met" in str(row)
    assert "memory 0.900 goal 0.8 missed" in str(row)
    row.ratio = 1.39
    assert "goal 1.40 missed" in str(row)


def test_failures_cost_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path, 10.0, ["plain"])

    def fail() -> None:
        raise RuntimeError("out of\nluck")

    report.attempt("plain", "plain", "x", fail)
    report.attempt("plain", "plain", "y", lambda: report.line("done"))
    lines = ["FAIL plain x: RuntimeError: out of luck", "done"]
    assert capsys.readouterr().out.splitlines() == lines
    assert json.loads((tmp_path / "report.json").read_text())["failed"] == lines[:1]


def test_what_there_is_no_time_for_is_named() -> None:
    # checks have 3 / 5.5 of the time of both parts
    minutes = FIRST_GUESS / 60 * 5.5 / 3 * 0.9
    report = Report(None, minutes, ["checks", "training"])
    report.attempt("checks", "network", "x", lambda: pytest.fail("began in spite of the time"))
    assert report.data["skipped"] == ["network x"]
    done = []
    report.attempt("training", "training", "y", lambda: done.append("y"))
    assert done == ["y"]
