from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.gpu_checks import CASES, Case, check_operation
from benchmarks.gpu_kernels import Contest, Duel, Step, compete
from benchmarks.gpu_report import GAVE_UP, PARTS, TRIAL, DeviceLost, Report
from benchmarks.gpu_timing import NETWORKS, Row, paired_ratio
from deit.complexity.published import PUBLISHED
from deit.complexity.timing import Timing
from deit.kernels import tuning

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
    assert {row["part"] for row in report["rows"]} == set(PARTS) - {"checks", "kernels", "profile"}
    assert all(row["ratio"] > 0 for row in report["rows"])
    assert all((row["error"] is not None) == (row["part"] == "inference") for row in report["rows"])
    assert {duel["op"] for duel in report["kernels"]} >= {"mirror_linear", "mirror_depthwise_taps"}
    assert len(report["profiles"]) == 12  # three networks and their twins, in two modes
    assert all(profile["kernels"] for profile in report["profiles"])
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


def test_wrong_logits_are_seen() -> None:
    row = Row("inference", "x", 64, 1.0, 1.0, 1.0, 0.0, 1.0, error=1e-2, plain_error=9e-3)
    assert row.right
    assert "error 1e-02 (plain 9e-03)" in str(row)
    row.error = 2e-2
    assert not row.right
    assert "WRONG" in str(row)
    row.error = float("nan")
    assert not row.right


def test_what_runs_at_the_end_of_the_time_is_given_up(tmp_path: Path) -> None:
    code = f"""if 1:
        import time
        from pathlib import Path
        from benchmarks import gpu_report
        gpu_report.GRACE = 0.5
        report = gpu_report.Report(Path({str(tmp_path)!r}), gpu_report.FIRST_GUESS / 60, ["plain"])
        report._longest["slow"] = 0.0
        report.stop = time.monotonic()
        close = lambda: (report.line("the tables"), report.save())
        slow = lambda: (report.give_up_in_time(close), time.sleep(600))
        report.attempt("plain", "slow", "compilation", slow)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == GAVE_UP, done.stderr
    expected = ["FAIL slow compilation: given up at the end of the time", "the tables"]
    assert done.stdout.splitlines() == expected
    assert json.loads((tmp_path / "report.json").read_text())["failed"] == expected[:1]


def test_a_lost_device_stops_the_process_but_not_the_report(monkeypatch, tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(gpu_report, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    report = Report(tmp_path, 10.0, ["plain", "large"], CPU)
    report.attempt("", *TRIAL.split(), lambda: None)
    report.attempt("plain", "plain", "x", lambda: None)
    monkeypatch.setattr(gpu_report, "is_lost", lambda device: True)
    with pytest.raises(DeviceLost, match="plain y"):
        report.attempt("plain", "plain", "y", fail)
    assert json.loads((tmp_path / "report.json").read_text())["failed"]
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: commands.append(command))
    gpu_report.run_rest(report, ["plain", "large"], "plain y", tmp_path)
    ((*_, parts, first, second, minutes, left, done, x, y, output, folder),) = commands
    assert (parts, first, second, minutes) == ("--parts", "plain", "large", "--minutes")
    assert float(left) == 10
    # the other process tries the compiler again, unless that was what lost the device
    assert (done, x, y) == ("--done", "plain x", "plain y")
    assert (output, folder) == ("--output", str(tmp_path / "rest"))
    other = Report(None, 10.0, ["plain"], CPU, done=[x, y])
    other.attempt("plain", "plain", "y", fail)
    assert not other.data["failed"]


def test_contests_take_the_best_of_both_sides(monkeypatch) -> None:
    plain, other = (
        tuning.Candidate("plain", lambda x: 2 * x),
        tuning.Candidate("triton", lambda x: x + x),
    )
    times = iter((4.0, 2.0, 3.0, 5.0))  # ours, then the twin's
    monkeypatch.setattr("benchmarks.gpu_kernels._milliseconds", lambda run, best: next(times))

    def function(x: torch.Tensor) -> torch.Tensor:
        return x * tuning.run("op", 0, plain, lambda: [plain, other], x.detach())

    step = Step("op", {"torch": lambda: None, "slow": lambda: None}, 6e9)
    (duel,) = compete(Contest("x", function, (torch.randn(2, 3),), [step]), CPU)
    assert duel.ours == {"plain": 4.0, "triton": 2.0}
    assert duel.ratio == 1.5
    line = str(duel)
    assert "3.000 ms      4 torch" in line
    assert "2.000 ms      3 triton" in line
    untimed = Duel("x", "op", {}, {"torch": 1.0}, 1.0, "TB/s", 1.0)
    assert untimed.ratio is None
    assert "not timed" in str(untimed)


def test_what_there_is_no_time_for_is_named(monkeypatch) -> None:
    guess = 1000.0
    monkeypatch.setattr(gpu_report, "FIRST_GUESS", guess)
    # checks have 3 / 5.5 of the time of both parts
    minutes = guess / 60 * 5.5 / 3 * 0.9
    report = Report(None, minutes, ["checks", "training"])
    report.attempt("checks", "network", "x", lambda: pytest.fail("began in spite of the time"))
    assert report.data["skipped"] == ["network x"]
    done = []
    report.attempt("training", "training", "y", lambda: done.append("y"))
    assert done == ["y"]
