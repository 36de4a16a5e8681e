"""The tour: its script runs, says what it should, and is the code on its page."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location("render", DOCS / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def restored():
    """The tour seeds torch, sets how it prints, and leaves the folder."""
    state, folder = torch.get_rng_state(), Path.cwd()
    os.chdir(DOCS.parent)
    yield
    os.chdir(folder)
    torch.set_rng_state(state)
    torch.set_printoptions(profile="default")


def code(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", page, re.DOTALL)


def test_the_page_shows_the_script(render):
    script = (DOCS / "tour.py").read_text(encoding="utf-8")
    page = (DOCS / "tour.md").read_text(encoding="utf-8")
    cells = render.cells(script)
    assert code(page) == [content for is_text, content in cells if not is_text]
    for text in (content for is_text, content in cells if is_text):
        assert text in page


@pytest.mark.slow
def test_the_script_runs_and_shows_what_it_claims(render, restored):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("peft")
    page = render.render((DOCS / "tour.py").read_text(encoding="utf-8"))
    outputs = re.findall(r"```text\n(.*?)\n```", page, re.DOTALL)
    text = "\n".join(outputs)
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
