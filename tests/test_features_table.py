"""Whatever the table of features names as evidence exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
ROWS = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ")][2:]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("| ")[:40])
def test_our_ticks_name_their_evidence(row):
    ours = row[1]
    commands = re.findall(r"`([^`]+)`", ours)
    assert commands or "✔" not in ours
    for command in commands:
        script = re.search(r"(\S+\.py)(?:::(\w+))?", command)
        if script is None:
            assert command == "make demo"
            assert "\ndemo:" in (ROOT / "Makefile").read_text(encoding="utf-8")
            continue
        path, test = ROOT / script.group(1), script.group(2)
        assert path.is_file(), path
        if test:
            assert f"def {test}(" in path.read_text(encoding="utf-8")
