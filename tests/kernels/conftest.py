"""Running tests of Triton kernels in a process of their own, interpreted on the CPU or on a GPU.

Triton decides when it is imported whether kernels are interpreted, and other tests import it too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


@pytest.fixture
def run_kernel_tests() -> Callable[[str, str], None]:
    """(file beside this one, "cpu" or "cuda") -> runs its tests there, or skips.

    On a CPU the kernels are interpreted. The file is told the device by DEIT_KERNEL_TESTS.
    """

    def run(name: str, device: str) -> None:
        if find_spec("triton") is None:
            pytest.skip("Triton is not installed")
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        interpret = "1" if device == "cpu" else "0"
        environment = {**os.environ, "TRITON_INTERPRET": interpret, "DEIT_KERNEL_TESTS": device}
        path = Path(__file__).with_name(name)
        options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-W", "ignore"]
        if device == "cpu":  # on a GPU, which is rarer, all failures are worth seeing
            options.append("-x")
        result = subprocess.run(
            [sys.executable, "-m", "pytest", *options, str(path)],
            env=environment,
            capture_output=True,
            text=True,
            cwd=path.parents[2],
        )
        if interpret == "1" and "only 0-dimensional arrays can be converted" in result.stdout:
            pytest.skip("this version of Triton's interpreter fails with this version of NumPy")
        assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]

    return run
