"""The package as installed from its wheel, used in an empty folder, away from this checkout."""

from __future__ import annotations

import configparser
import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deit.launch.recipes import RECIPES

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel holds, as pip would unpack it."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    # from a copy, so that setuptools leaves no build/ in the checkout
    copy = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "deit", "pyproject.toml", "README.md", "LICENSE", "requirements*.txt"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    if not tracked:
        pytest.skip("not a git checkout")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((REPOSITORY / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "."]
    subprocess.run([*command, "-w", str(folder)], cwd=copy, check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(installed: Path, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(installed), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def command(entry: str, *words: str) -> str:
    """What the script that pip makes for an entry point does."""
    module, _, function = entry.partition(":")
    return (
        f"import sys; sys.argv = {['x', *words]!r}; from {module} import {function}; "
        f"sys.exit({function}())"
    )


@pytest.mark.slow
def test_recipes_sample_and_commands_are_in_the_wheel(installed, tmp_path):
    for path in RECIPES.rglob("*.toml"):
        inside = installed / "deit" / "recipes" / path.relative_to(RECIPES)
        assert inside.read_bytes() == path.read_bytes()
    parser = configparser.ConfigParser()
    parser.read(next(installed.glob("*.dist-info")) / "entry_points.txt")
    scripts = dict(parser["console_scripts"])
    names = "complexity equivariance evaluate export launch predict train"
    assert sorted(scripts) == [f"deit-{name}" for name in names.split()]
    for entry in scripts.values():
        module, _, function = entry.partition(":")
        assert callable(getattr(importlib.import_module(module), function))

    words = ["--recipe", "d2_deit_base_patch16_LS", "--print-command"]
    done = run(installed, tmp_path, command(scripts["deit-launch"], *words))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torchrun --nproc-per-node 4 -m deit.main ")
    tiny = ["--model", "d2_deit_tiny_patch16_LS", "--model-kwargs", "depth=1", "--input-size", "32"]
    tiny += ["--patch-size", "16", "--num-workers", "0"]
    words = [*tiny, "--epochs", "1", "--output-dir", "run", "--published", "deit"]
    done = run(installed, tmp_path, command(scripts["deit-train"], *words))
    assert done.returncode == 0, done.stderr
    words = [*tiny, "--resume", "run/checkpoint.pth"]
    done = run(installed, tmp_path, command(scripts["deit-evaluate"], *words))
    assert "Accuracy of the network on the" in done.stdout, done.stderr
    words = ["--models", "d2_deit_tiny_patch16_LS", "--no-throughput"]
    done = run(installed, tmp_path, command(scripts["deit-complexity"], *words))
    assert "d2_deit_tiny_patch16_LS" in done.stdout, done.stderr
    done = run(installed, tmp_path, command(scripts["deit-equivariance"], "--model", "nosuch"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
