"""Triton's nonlinearity against float64, run by test_gelu_kernels.py (see conftest.py)."""

from __future__ import annotations

import os

import pytest
import torch

from deit.kernels import gelu_triton, tuning
from deit.kernels.gelu import mirror_gelu, plain_gelu, plain_gelu_backward

DEVICE = os.environ["DEIT_KERNEL_TESTS"]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def _setting(monkeypatch):
    """A seed, and uninitialised memory full of NaN."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize(("rows", "width"), [(1, 2), (37, 150), (9, 1100)])
def test_gelu(rows: int, width: int, act: str, dtype: torch.dtype) -> None:
    # Values up to where the slopes are one and zero; rows with a stride.
    x = (3 * torch.randn(rows, width + 6, device=DEVICE)).to(dtype)[:, 6:]
    grad = torch.randn(rows, width + 2, device=DEVICE).to(dtype)[:, :width]
    expected = plain_gelu(x.double(), act)
    expected_grad = plain_gelu_backward(grad.double(), x.double(), act)
    for forward, backward in zip(gelu_triton.FORWARD, gelu_triton.BACKWARD, strict=True):
        for actual, exact in (
            (forward.run(x, act), expected),
            (backward.run(grad, x, act), expected_grad),
        ):
            assert actual.dtype == dtype
            error = (actual.double() - exact).norm() / exact.norm()
            assert error <= TOLERANCE[dtype], f"{float(error):.1e}"


@pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.mem_get_info()[0] < 32e9, reason="needs a GPU with 32 GB free"
)
def test_offsets_beyond_31_bits() -> None:
    x = torch.zeros((1 << 20) + 9, 2048, dtype=torch.bfloat16, device=DEVICE)
    x[-9:].normal_()
    for forward, backward in zip(gelu_triton.FORWARD, gelu_triton.BACKWARD, strict=True):
        torch.testing.assert_close(forward.run(x, "gelu")[-9:], plain_gelu(x[-9:], "gelu"))
        actual = backward.run(x, x, "gelu")[-9:]
        torch.testing.assert_close(actual, plain_gelu_backward(x[-9:], x[-9:], "gelu"))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradient_of_the_operation(backend: str) -> None:
    x = torch.randn(3, 5, 24, device=DEVICE, requires_grad=True)
    grad = torch.randn(3, 24, 5, device=DEVICE).transpose(1, 2)  # no row is contiguous
    f = torch.compile(mirror_gelu, fullgraph=True, backend=backend)
    with tuning.only("triton"):
        (got,) = torch.autograd.grad(f(x), x, grad)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(plain_gelu(exact, "gelu"), exact, grad.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
