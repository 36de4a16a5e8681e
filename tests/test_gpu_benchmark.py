"""benchmarks/gpu.py on a CPU: rows of every part, what is kept, skipped and refused."""

import contextlib
import json
import time

import pytest
import torch

from benchmarks import exactness, gpu
from deit.errors import UserError
from deit.main import main as train
from deit.measure import command as complexity
from deit.measure.roofline import PeakRates
from deit.train.args import parse_args

QUICK = ["--device", "cpu", "--quick", "--seconds", "0", "--minutes", "9"]


@pytest.fixture(scope="module", autouse=True)
def started(data):
    """Commands in this process, on a device whose peak rates are known; `execute` as it is."""
    real = gpu.execute
    small = ["--data-path", str(data), "--batch-size", "8"]
    commands = {
        "calculate_complexity.py": complexity.main,
        "benchmarks/exactness.py": exactness.main,
        "deit/main.py": lambda words: train(parse_args([*words, *small])),
    }

    def execute(words, root, log, seconds):
        script, *options = words
        with log.open("w") as file, contextlib.redirect_stdout(file):
            assert commands[script](options) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "execute", execute)
        patch.setattr(complexity, "measure_peak_rates", lambda *_: PeakRates(1e11, 1e10))
        patch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
        yield real


@pytest.fixture(scope="module")
def folder(tmp_path_factory, started):
    folder = tmp_path_factory.mktemp("gpu")
    assert gpu.main([*QUICK, "--output", str(folder)]) == 0
    return folder


def finished(folder):
    rows = gpu.read_rows(folder)
    return [(row["part"], row["name"]) for row in rows if "finished_s" in row]


def test_rows_of_every_part(folder):
    rows = gpu.read_rows(folder)
    assert finished(folder) == [(part, names[0]) for part, (_, _, names) in gpu.PARTS.items()]
    speeds = [row["speeds"] for row in rows if "speeds" in row]
    assert all(speed > 0 for found in speeds for speed in found.values())
    assert [len(found) for found in speeds] == [2, 2, 2, 1, 1]  # training in the first three
    (errors,) = (row["lines"] for row in rows if row["part"] == "exactness")
    assert len(errors) == 2 * (len(exactness.MODELS) + 4)  # and twins, of which three have one
    bounds = {"float32": (0, 1e-5, 1e-4), "bfloat16": (1e-5, 0.1, 0.3)}
    for _, precision, *found in errors:
        least, *most = bounds[precision]
        assert all(least < float(f) < m for f, m in zip(found, most, strict=True))
    assert rows[0]["command"].startswith("python ")


def test_report_of_partial_results(folder, tmp_path):
    whole = (folder / "report.md").read_text()
    assert all(f"## {title}" in whole for title in ("Rates", "Relative", "Profile", "Two epochs"))
    rows = gpu.read_rows(folder)[:2]  # up to the first part
    (tmp_path / gpu.ROWS).write_text(json.dumps(rows))
    assert gpu.main(["--report", str(tmp_path)]) == 0
    assert "Rates and peak memory" in (tmp_path / "report.md").read_text()
    assert "Relative errors" not in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    # what was finished is not measured again
    assert gpu.main([*QUICK, "--output", str(tmp_path), "--parts", "vit", "latency"]) == 0
    assert gpu.read_rows(tmp_path)[:2] == rows
    assert finished(tmp_path) == [("vit", gpu.VIT[0]), ("latency", gpu.VIT[0])]


def test_what_there_is_no_time_for_is_skipped(tmp_path):
    gpu.main([*QUICK, "--minutes", "0", "--output", str(tmp_path)])
    rows = gpu.read_rows(tmp_path)
    assert {row["part"] for row in rows if "skipped" in row} == set(gpu.PARTS)
    assert "skipped, no time was left" in (tmp_path / "report.md").read_text()


def test_a_job_is_given_up_and_a_failure_costs_its_row(started, tmp_path, monkeypatch):
    log, begin = tmp_path / "log", time.monotonic()
    wait = "import subprocess; subprocess.run(['sleep', '600'])"
    assert "given up" in started(["-c", wait], tmp_path, log, 0.5)
    assert time.monotonic() - begin < 60
    assert started(["-c", "exit('a defect')"], tmp_path, log, 60) == "ended with status 1: a defect"
    assert started(["-c", ""], tmp_path, log, 60) is None
    monkeypatch.setattr(gpu, "execute", lambda *_: "a defect")
    assert gpu.main([*QUICK, "--output", str(tmp_path), "--parts", "vit", "large"]) == 1
    assert (tmp_path / "report.md").read_text().count(": a defect") == 2


def test_another_checkout_takes_turns(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "execute", lambda words, root, *_: seen.append((words, root)))
    (tmp_path / "calculate_complexity.py").touch()
    out = tmp_path / "a b"
    words = ["--against", str(tmp_path), "--parts", "vit", "large", "--output", str(out)]
    assert gpu.main([*QUICK, "--compile-blocks", *words]) == 0
    assert [(words[0], root) for words, root in seen] == 2 * [
        ("calculate_complexity.py", root) for root in (gpu.ROOT, tmp_path)
    ]
    # a whole network where there are CUDA graphs
    assert ["--compile-blocks" in words for words, _ in seen] == [True, True, False, False]
    assert str(out / f"this-vit-{gpu.VIT[0]}.json") in seen[0][0]


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
    row = dict(part="run", device="cuda", quick=False, compile_blocks=False)
    (tmp_path / gpu.ROWS).write_text(json.dumps([row]))
    with pytest.raises(UserError, match="other settings"):
        gpu.main([*QUICK, "--output", str(tmp_path)])
