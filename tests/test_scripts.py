"""Scripts that write tracked files take no argument that they do not know."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("assets", "benchmarks", "docs", "experiments")
    for path in (ROOT / folder).rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


def test_scripts_are_found():
    assert {"assets/draw.py", "docs/render.py", "benchmarks/performance_page.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_arguments_are_refused(script, monkeypatch, capsys):
    def written():
        return {p: p.stat().st_mtime_ns for p in (ROOT / script).parent.iterdir()}

    monkeypatch.setattr(sys, "argv", [script, "--foo"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = written()
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stopped.value.code == 2
    assert "--foo" in capsys.readouterr().err
    after = written()
    assert {p: t for p, t in after.items() if p.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    }


@pytest.mark.parametrize("folder", ["assets", "benchmarks", "docs"])
def test_what_is_not_a_script_does_not_look_like_one(folder):
    cells = {"docs/tour.py"}  # run by docs/render.py, or in an editor
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
    assert files - cells - {f"{folder}/__init__.py"} <= set(SCRIPTS)
