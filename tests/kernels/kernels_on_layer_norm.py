"""Triton's LayerNorm against float64, run by test_layer_norm_kernels.py (see conftest.py)."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from deit.kernels import layer_norm_triton, tuning
from deit.kernels.layer_norm import (
    mirror_layer_norm,
    plain_layer_norm,
    plain_layer_norm_backward,
)

DEVICE = os.environ["DEIT_KERNEL_TESTS"]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EPS = 1e-2


@pytest.fixture(autouse=True)
def _setting(monkeypatch):
    """A seed, and uninitialised memory full of NaN."""
    torch.manual_seed(0)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


def close(actual: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    error = (actual.double() - exact).norm() / exact.norm()
    assert error <= tolerance, f"{float(error):.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "width"), [(1, 4), (37, 150), (5, 1100)])
def test_layer_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    # Rows with a stride, far from zero mean; the scales differ from row to row.
    x = (5 + torch.randn(rows, width + 6, device=DEVICE)).to(dtype)[:, 6:]
    x = x * torch.linspace(0.5, 4, rows, device=DEVICE)[:, None].to(dtype)
    weight, bias = (torch.randn(width, device=DEVICE) for _ in range(2))
    grad = torch.randn(rows, width, device=DEVICE).to(dtype)
    exact_y, exact_moments = plain_layer_norm(
        x.double(), weight.double(), bias.double(), EPS, torch.float64
    )
    exact = plain_layer_norm_backward(
        grad.double(), x.double(), weight.double(), exact_moments, EPS
    )
    half = width // 2
    for config in layer_norm_triton.FORWARD_CONFIGS:
        if layer_norm_triton.tile(half, config)[0]:
            y, moments = layer_norm_triton.forward(x, weight, bias, EPS, dtype, config)
            assert y.dtype == dtype
            close(y, exact_y, TOLERANCE[dtype])
            close(moments, exact_moments, 2e-6)
    for config in layer_norm_triton.BACKWARD_CONFIGS:
        if layer_norm_triton.tile(half, config)[0]:
            dx, sums = layer_norm_triton.backward(grad, x, weight, moments, EPS, config)
            assert dx.dtype == dtype
            close(dx, exact[0], 10 * TOLERANCE[torch.float32] + TOLERANCE[dtype])
            close(sums, exact[1], 2e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients_of_the_operation(backend: str) -> None:
    x = torch.randn(3, 24, 5, device=DEVICE).transpose(1, 2).requires_grad_()
    weight, bias = (torch.randn(24, device=DEVICE, requires_grad=True) for _ in range(2))
    grad = torch.randn(3, 24, 5, device=DEVICE).transpose(1, 2)  # no row is contiguous
    f = torch.compile(mirror_layer_norm, fullgraph=True, backend=backend)
    with tuning.only("triton"):
        got = torch.autograd.grad(f(x, weight, bias), (x, weight, bias), grad)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(mirror_layer_norm(*exact), exact, grad.double())
    for actual, value in zip(got, expected, strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kernels_agree_with_the_plain_formulas_of_the_dtype(dtype: torch.dtype) -> None:
    """Through the tuner, as users get there: none is dropped."""
    x = torch.randn(5, 3, 22, device=DEVICE).to(dtype).requires_grad_()
    weight, bias = (torch.randn(22, device=DEVICE, requires_grad=True) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        mirror_layer_norm(x, weight, bias).square().sum().backward()
    decided = {d.op: d.chosen for d in tuning.report() if d.dtype == dtype and d.key[0] == 22}
    assert set(decided) == {"mirror_layer_norm", "mirror_layer_norm_backward"}
    if DEVICE == "cpu":  # where nothing is timed, the preferred candidate that agrees
        assert all(name.startswith("triton") for name in decided.values())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_choice_is_a_kernel(context) -> None:
    x, vector = torch.randn(9, 12, device=DEVICE), torch.ones(12, device=DEVICE)
    with context(), tuning.only("triton"):
        forced = mirror_layer_norm(x, vector, vector)
    with context():
        first, second = (mirror_layer_norm(x, vector, vector) for _ in range(2))
    torch.testing.assert_close(first, second)
    decided = [d for d in tuning.report() if d.op == "mirror_layer_norm"][-1]
    if DEVICE == "cpu":  # where nothing is timed, the preferred candidate that agrees
        assert decided.chosen.startswith("triton")
        assert torch.equal(second, forced)


def test_rows_that_do_not_fit_run_plain() -> None:
    width = 2 * layer_norm_triton.LARGEST_HALF + 2
    x, vector = torch.randn(2, width, device=DEVICE), torch.ones(width, device=DEVICE)
    y = mirror_layer_norm(x, vector, vector)
    torch.testing.assert_close(y[:, : width // 2].mean(1), torch.ones(2, device=DEVICE))
