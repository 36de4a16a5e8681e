"""The package as installed from its wheel, used in an empty folder, away from this checkout."""

from __future__ import annotations

import configparser
import importlib
import os
import re
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


# What the scripts do that pip makes for entry points, one after the other.
COMMANDS = """
import importlib, sys
for entry, words in {calls}:
    module, function = entry.split(":")
    sys.argv = ["x", *words.split()]
    print("status", getattr(importlib.import_module(module), function)())
"""


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

    tiny = "--model d2_deit_tiny_patch16_LS --model-kwargs depth=1 --input-size 32 --patch-size 16 "
    tiny += "--num-workers 0 "
    calls = [
        (scripts["deit-launch"], "--recipe d2_deit_base_patch16_LS --print-command"),
        (scripts["deit-train"], tiny + "--epochs 1 --output-dir run --published deit"),
        (scripts["deit-evaluate"], tiny + "--resume run/checkpoint.pth"),
        (scripts["deit-complexity"], "--models resmlp_equi_d2_12 --no-throughput"),
        (scripts["deit-equivariance"], "--model nosuch"),
    ]
    env = os.environ | {"PYTHONPATH": str(installed), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS.format(calls=calls)],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    launch, train, evaluate, complexity, *_ = done.stdout.split("status 0\n")
    assert done.stdout.endswith("status 2\n"), done.stderr
    assert launch.startswith("torchrun --nproc-per-node 4 -m deit.main ")
    assert "saved   run/checkpoint.pth" in train
    assert "Accuracy of the network on the" in evaluate
    assert "resmlp_equi_d2_12" in complexity
    assert re.search("^error: .*nosuch.*\n$", done.stderr, re.M)
