"""Rooms import from the floors below them only; the page and its drawing show what there is."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from PIL import Image

# the script puts this folder in its place
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
import architecture

ROOT = Path(__file__).resolve().parents[1]


def test_no_import_points_up():
    arrows = architecture.find_arrows(ROOT)
    assert ("scripts", "train") in arrows
    assert ("layers", "groups") in arrows
    assert architecture.wrong_arrows(arrows) == []


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("layers/new.py", "import deit.models.vit\n", "layers must not import models"),
        ("groups.py", "from deit import saving\n", "groups must not import saving"),
        ("train/new.py", "def f():\n    from ..launch.slurm import a\n",
         "train must not import launch"),
        ("data/sub/new.py", "from deit import layers as L\n", "data must not import layers"),
        ("verify/__init__.py", "from deit.export import main\n", "verify must not import scripts"),
        ("models/new.py", "from experiments.demo import main\n", "models must not import scripts"),
        ("attic/new.py", "from deit.groups import Rep\n", "attic must not import groups"),
        ("train/new.py", "import deit.attic\n", "train must not import attic"),
    ],
)  # fmt: skip
def test_imports_that_point_up_are_found(file, text, found, tmp_path):
    for path in ("saving.py", "layers/__init__.py", file):
        (tmp_path / "deit" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "deit" / path).write_text("import torch\n")
    assert architecture.wrong_arrows(architecture.find_arrows(tmp_path)) == []
    (tmp_path / "deit" / file).write_text(text)
    (wrong,) = architecture.wrong_arrows(architecture.find_arrows(tmp_path))
    assert wrong.startswith(f"deit/{file}:{text.count(chr(10))} ")
    assert wrong.endswith(f"({found})")


def test_the_drawing_shows_the_arrows_there_are():
    steps = architecture.steps(architecture.find_arrows(ROOT))
    with Image.open(architecture.FIGURE) as image:
        drawn = image.text["Description"]
    assert drawn == architecture.described(steps), "run python docs/architecture.py"


def test_the_page_names_files_that_exist():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = {room for rooms in architecture.FLOORS for room in rooms}
    assert rooms == set(architecture.PLACES)
    assert all(f"`{room}/`" in page or f"`{room}.py`" in page for room in rooms - {"scripts"})
    named = re.findall(r"`([\w./]+(?:\.py|/))`", page)
    folders = [ROOT, ROOT / "deit", ROOT / "deit/layers"]
    assert [name for name in named if not any((f / name).exists() for f in folders)] == []
