"""Pages and figures show what their scripts make of the files that they name."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import performance_page
from deit.deploy.files import ANY_BATCH_IN_ONNX

# the script puts this folder in its place
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
import render

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("assets", "benchmarks", "docs", "experiments")
    for path in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_arguments_are_refused_by_scripts_that_write_tracked_files(
    script, monkeypatch, capsys
):
    def written():
        return {path: path.stat().st_mtime_ns for path in (ROOT / script).parent.glob("*.*")}

    monkeypatch.setattr(sys, "argv", [script, "--foo"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = written()
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stopped.value.code == 2
    assert "--foo" in capsys.readouterr().err
    assert written() == before


def test_what_is_not_a_script_does_not_look_like_one():
    folders = ("assets", "benchmarks", "docs")
    files = {path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    files -= {ROOT / "benchmarks/__init__.py"}
    files -= {ROOT / "docs/tour.py"}  # run by docs/render.py, or in an editor
    scripts = {ROOT / script for script in SCRIPTS if script.startswith(folders)}
    assert files == scripts


def test_ticks_in_the_table_of_features_name_evidence_that_exists():
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    assert rows
    for row in rows:
        commands = re.findall(r"`([^`]+)`", row[1])
        assert commands or "✔" not in row[1], row
        for command in commands:
            if command == "make demo":
                assert "\ndemo:" in (ROOT / "Makefile").read_text(encoding="utf-8")
                continue
            path, _, test = re.search(r"\S+\.py\S*", command)[0].partition("::")
            script = (ROOT / path).read_text(encoding="utf-8")
            assert not test or f"def {test}(" in script, row


def test_tables_and_figures_of_performance_come_from_the_result_files(tmp_path, monkeypatch):
    committed = {name: getattr(performance_page, name).read_bytes() for name in ("PAGE", "README")}
    monkeypatch.setattr(performance_page, "ASSETS", tmp_path)
    for name, content in committed.items():
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(performance_page, name, tmp_path / name)
    assert performance_page.main([]) == 0
    for name, content in committed.items():
        assert (tmp_path / name).read_bytes() == content
        assert b"| `d2_deit_base_patch16_LS` |" in content
    for name in ("throughput.png", "deploy.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    files = list(performance_page.RESULTS.glob("cpu_*.json"))
    assert files
    for file in files:
        settings = json.loads(file.read_text(encoding="utf-8"))["settings"]
        assert (settings["threads"], bool(settings["versions"]["torch"])) == (2, True)


def test_the_figure_of_performance_has_a_bar_for_each_network_and_mode():
    conditions, found = performance_page.ratios()
    modes = performance_page.MODES
    figure = performance_page.bars(found, modes, conditions, flops=True)
    bars = sorted(bar.get_width() for axes in figure.axes for bar in axes.patches)
    assert bars == sorted(own[mode] for mode in modes for own in found.values() if mode in own)


def test_the_page_of_the_tour_shows_its_script():
    page = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    cells = render.cells((ROOT / "docs" / "tour.py").read_text(encoding="utf-8"))
    shown = re.findall(r"```python\n(.*?)\n```", page, re.DOTALL)
    assert shown == [content for is_text, content in cells if not is_text]
    assert all(content in page for is_text, content in cells if is_text)


@pytest.mark.slow
@pytest.mark.skipif(not ANY_BATCH_IN_ONNX, reason="its ONNX file of any batch needs a later torch")
def test_the_tour_runs_and_shows_what_it_claims(monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("peft")
    monkeypatch.chdir(ROOT)
    with torch.random.fork_rng():  # which it seeds
        page = render.render((ROOT / "docs" / "tour.py").read_text(encoding="utf-8"))
    torch.set_printoptions(profile="default")
    text = "\n".join(re.findall(r"```text\n(.*?)\n```", page, re.DOTALL))
    assert "weights: 32 of 64" in text
    assert "zeros in the regular basis: 0  packed: 32" in text
    answers = re.findall(r"(?:as the network|A = D|B = C): (\w+)", text)
    assert answers == ["True"] * 3
    plain = re.findall(r"on the test images (.*)|^(?:upside down, )?after (.*)", text, re.MULTILINE)
    mirrored = re.findall(r"on their mirror images (.*)", text)
    assert [first or second for first, second in plain] == mirrored
    assert all(float(percent.split()[0]) > 40 for percent in mirrored)
    before, after, merged = re.findall(
        r"upside down, \w+ (\S+) %|^merged (\S+) %", text, re.MULTILINE
    )
    assert float(before[0]) + 3 < float(after[0]) == float(merged[1])
    errors = [float(error) for error in re.findall(r"error=([\d.e+-]+)", text)]
    assert max(*errors[:2], errors[4]) < 1e-6  # ours, and the network with a LoRA
    assert min(errors[2:4]) > 0.1  # the wrong layers
    trained, folded = re.findall(r"^(?:trained|folded ) (\d+) operations, (.*)", text, re.MULTILINE)
    assert int(folded[0]) < int(trained[0])
    assert folded[1] == trained[1] == plain[0][0]
    assert "Ankle boot, Ankle boot\n" in text  # in ONNX Runtime
    assert "imported of torch and deit: []" in text
    predictions = re.findall(r"^photos/(\w+).png  (.*)", text, re.MULTILINE)
    assert [name for name, _ in predictions] == ["mirrored", "shoe"] * 2
    assert all(found.startswith("Ankle boot") for _, found in predictions)
