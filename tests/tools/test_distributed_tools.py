"""DDP and FSDP2 on every family: whole networks, blocks and the linear maps inside.

Two processes are started once and run all cases; each test reads what they say of one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from two_processes import CASES, FAMILIES

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    children = []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "FOLDER": str(folder), "PYTHONPATH": path}
        with open(folder / f"rank{rank}.txt", "w") as log:
            command = [sys.executable, str(HERE / "two_processes.py")]
            children.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        for child in children:
            child.wait(timeout=400)
    finally:
        for child in children:
            child.kill()
    logs = [(folder / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert all((folder / f"rank{rank}.json").exists() for rank in range(2)), logs
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_compute_what_one_does(family, case, results):
    for rank in range(2):
        assert results[rank][f"{family}, {case}"] == "", f"rank {rank}"
