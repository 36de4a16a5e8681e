"""The package as installed from its wheel, used in an empty folder, away from this checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deit.launch.recipes import RECIPES

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = "--model d2_deit_tiny_patch16_LS --model-kwargs depth=1 --input-size 32 --patch-size 16 "
TINY += "--num-workers 0 "
# In this order; the last three are told what is wrong.
CALLS = {
    "deit-launch": "--recipe d2_deit_base_patch16_LS --print-command",
    "deit-train": TINY + "--epochs 1 --output-dir run --published deit",
    "deit-evaluate": TINY + "--resume run/checkpoint.pth",
    "deit-complexity": "--models resmlp_equi_d2_12 --no-throughput",
    "deit-equivariance": "--model nosuch",
    "deit-export": "--model nosuch --format onnx --output nosuch.txt",
    "deit-predict": "nosuch --checkpoint a.pth",
}
# What the scripts do that pip makes for entry points, one after the other.
COMMANDS = f"""
import sys
from importlib.metadata import distribution
entries = {{entry.name: entry for entry in distribution("mirror-equivariant-vision").entry_points}}
assert entries.keys() == {set(CALLS)}, entries
for name, words in {CALLS}.items():
    sys.argv = ["x", *words.split()]
    print("status", entries[name].load()())
"""


@pytest.mark.slow
def test_recipes_sample_and_commands_are_in_the_wheel(tmp_path):
    pytest.importorskip("setuptools", "70.1")  # earlier ones need the package wheel
    # from a copy, so that setuptools leaves no build/ in the checkout
    copy, installed = tmp_path / "source", tmp_path / "site"
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
    subprocess.run([*command, "-w", str(tmp_path)], cwd=copy, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(installed)
    for path in RECIPES.rglob("*.toml"):
        inside = installed / "deit" / "recipes" / path.relative_to(RECIPES)
        assert inside.read_bytes() == path.read_bytes()

    away = tmp_path / "away"
    away.mkdir()
    env = os.environ | {"PYTHONPATH": str(installed), "HOME": str(away), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], cwd=away, env=env,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    launch, train, evaluate, complexity, refused = done.stdout.split("status 0\n")
    assert launch.startswith("torchrun --nproc-per-node 4 -m deit.main ")
    assert "saved   run/checkpoint.pth" in train
    assert "Accuracy of the network on the" in evaluate
    assert "resmlp_equi_d2_12" in complexity
    assert refused == 3 * "status 2\n", done.stderr
    assert len(re.findall("^error: .*nosuch.*$", done.stderr, re.MULTILINE)) == 3
