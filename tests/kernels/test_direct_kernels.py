from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from deit.kernels import backends, gpu


def test_interpreted(run_kernel_tests) -> None:
    if find_spec("triton") is not None:
        from triton.runtime import interpreter

        if not hasattr(interpreter, "_LangPatchScope"):
            pytest.skip("this version of Triton cannot compile any more once it has interpreted")
    run_kernel_tests("kernels_on_direct.py", "cpu")


@pytest.mark.gpu
def test_on_a_gpu(run_kernel_tests) -> None:
    run_kernel_tests("kernels_on_direct.py", "cuda")


@pytest.mark.parametrize("device", ["cpu", "meta", torch.device("cpu")])
def test_only_gpus_are_tried(device: torch.device | str) -> None:
    assert not gpu.trust_compiler(device)
    assert not backends.trusted


def test_nothing_is_loaded_before_it_is_needed() -> None:
    """The operations that need Triton, where something asks for a trial in vain."""
    code = """if 1:
        import sys
        from deit.kernels import gpu
        gpu.trust_compiler("cpu")
        assert "deit.kernels.direct" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
