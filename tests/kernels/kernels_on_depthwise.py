"""Triton's depthwise convolution against float64, run by test_depthwise_kernels.py."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from deit.kernels import depthwise_triton, tuning
from deit.kernels.depthwise import (
    mirror_depthwise,
    plain_depthwise,
    plain_input_gradient,
    plain_taps_gradient,
)

DEVICE = os.environ["DEIT_KERNEL_TESTS"]
torch.backends.cudnn.allow_tf32 = False  # the plain formula would round to ten bits
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CONFIGS = sorted({*depthwise_triton.WIDE, *depthwise_triton.NARROW})
# (B, H, W, C): more than one tile along the width, and along the channels of a quarter; more rows
# than a kernel has; more than one image; maps smaller than a kernel
SHAPES = [(1, 3, 18, 4), (1, 2, 5, 144), (1, 9, 4, 4), (2, 2, 3, 4), (1, 1, 1, 4)]


@pytest.fixture(autouse=True)
def _setting(monkeypatch):
    """A seed, and uninitialised memory full of NaN."""
    torch.manual_seed(0)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


def close(actual: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    error = (actual.double() - exact).norm() / exact.norm()
    assert error <= tolerance, f"{float(error):.1e}"


def maps(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random maps of which each image, row and position has a stride; channels are contiguous."""
    images, height, width, channels = shape
    whole = torch.randn(images, height + 1, width + 2, channels + 8, device=DEVICE)
    return whole.to(dtype)[:, 1:, 1:-1, :channels]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_depthwise(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad = maps(shape, dtype), maps(shape, dtype)
    taps = torch.randn(7, 4, shape[-1], device=DEVICE)
    bias = torch.randn(shape[-1], device=DEVICE)
    double = torch.float64
    exact = plain_depthwise(x.double(), taps.double(), bias.double(), double)
    exact_dx = plain_input_gradient(grad.double(), taps.double(), double)
    exact_sums = plain_taps_gradient(grad.double(), x.double(), 7)
    # all tiles in one dtype, one in the others: the interpreter is slow
    for config in CONFIGS if dtype == torch.float32 else CONFIGS[:1]:
        y = depthwise_triton.convolve(x, taps, bias, dtype, config)
        dx = depthwise_triton.convolve(grad, taps, None, dtype, config, backward=True)
        sums = depthwise_triton.taps_gradient(grad.contiguous(), x, 7, config)
        assert (y.dtype, dx.dtype, sums.dtype) == (dtype, dtype, dtype)
        close(y, exact, TOLERANCE[dtype])
        close(dx, exact_dx, TOLERANCE[dtype])
        close(sums, exact_sums, TOLERANCE[dtype])


def test_images_of_a_program_are_added_up(monkeypatch) -> None:
    monkeypatch.setattr(depthwise_triton, "PROGRAMS", 1)
    x, grad = (torch.randn(3, 3, 9, 4, device=DEVICE) for _ in range(2))
    exact = plain_taps_gradient(grad.double(), x.double(), 7)
    config = depthwise_triton.NARROW[-1]
    for processors in (1, 8):  # all images in one program, and two programs, of two and of one
        monkeypatch.setattr(depthwise_triton, "processors", lambda device, n=processors: n)
        close(depthwise_triton.taps_gradient(grad, x, 7, config), exact, 1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_of_the_operation(backend: str, with_bias: bool) -> None:
    # the channels of x are not contiguous
    x = torch.randn(2, 8, 4, 5, device=DEVICE).permute(0, 2, 3, 1).requires_grad_()
    grad = torch.randn(2, 8, 4, 5, device=DEVICE).permute(0, 2, 3, 1)
    inputs = [x, torch.randn(8, 1, 7, 4, device=DEVICE, requires_grad=True)]
    if with_bias:
        inputs.append(torch.randn(8, device=DEVICE, requires_grad=True))
    f = torch.compile(mirror_depthwise, fullgraph=True, backend=backend)
    with tuning.only("triton"):
        got = torch.autograd.grad(f(*inputs), inputs, grad)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(mirror_depthwise(*exact), exact, grad.double())
    for actual, value in zip(got, expected, strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kernels_agree_with_the_plain_formulas_of_the_dtype(dtype: torch.dtype) -> None:
    """Through the tuner, as users get there: none is dropped."""
    x = torch.randn(2, 3, 5, 8, device=DEVICE).to(dtype).requires_grad_()
    kernel = torch.randn(8, 1, 7, 4, device=DEVICE, requires_grad=True)
    bias = torch.randn(8, device=DEVICE, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        mirror_depthwise(x, kernel, bias).square().sum().backward()
    decided = {d.op: d.chosen for d in tuning.report() if d.dtype == dtype and d.key[0] == 3}
    assert set(decided) == {"mirror_depthwise" + end for end in ("", "_input", "_taps")}
    if DEVICE == "cpu":  # where nothing is timed, the preferred candidate that agrees
        assert all(name.startswith("triton") for name in decided.values())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_choice_is_a_kernel(context) -> None:
    x, kernel = torch.randn(2, 4, 5, 8, device=DEVICE), torch.randn(8, 1, 7, 4, device=DEVICE)
    with context(), tuning.only("triton"):
        forced = mirror_depthwise(x, kernel)
    with context():
        first, second = (mirror_depthwise(x, kernel) for _ in range(2))
    torch.testing.assert_close(first, second)
    decided = [d for d in tuning.report() if d.op == "mirror_depthwise"][-1]
    if DEVICE == "cpu":  # where nothing is timed, the preferred candidate that agrees
        assert decided.chosen.startswith("triton")
        assert torch.equal(second, forced)


@pytest.mark.parametrize("images", [0, 1])
def test_no_images(images: int) -> None:
    """A batch of none gives nothing and gradients of zero, also where kernels were chosen."""
    x = torch.randn(images, 2, 3, 4, device=DEVICE, requires_grad=True)
    kernel = torch.randn(4, 1, 7, 4, device=DEVICE, requires_grad=True)
    with tuning.only("triton"):
        y = mirror_depthwise(x, kernel)
        dx, d_kernel = torch.autograd.grad(y.sum(), (x, kernel))
    assert y.shape == dx.shape == x.shape
    assert bool((d_kernel != 0).any()) == bool(images)
    assert not d_kernel.isnan().any()


def test_other_kernel_sizes_run_plain() -> None:
    x, kernel = torch.randn(2, 4, 5, 8, device=DEVICE), torch.randn(8, 1, 3, 2, device=DEVICE)
    expected = mirror_depthwise(x.double(), kernel.double())
    torch.testing.assert_close(mirror_depthwise(x, kernel), expected.float(), rtol=1e-4, atol=1e-5)
