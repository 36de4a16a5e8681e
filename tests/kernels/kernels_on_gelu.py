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
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


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
