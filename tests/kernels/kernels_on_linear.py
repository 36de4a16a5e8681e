"""Triton's linear maps against float64, run by test_linear_kernels.py (see conftest.py)."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from torch import Tensor

from deit.kernels import linear_launch as launch
from deit.kernels import tuning
from deit.kernels.gelu import plain_gelu
from deit.kernels.linear import (
    _plain_linear,
    _plain_weight_grad,
    mirror_linear,
)

DEVICE = os.environ["DEIT_KERNEL_TESTS"]
# The interpreter cannot multiply matrices of bfloat16.
HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# rows, K, N, in_segment, out_segment, bias. No size is a multiple of a tile's, rows fill more than
# one tile of 64; 32 and 40 are half a head in the networks. Rows of 50 elements of two bytes are
# nowhere aligned to more than four.
SHAPES = [
    (70, 96, 200, None, None, True),
    (133, 80, 160, 40, None, False),
    (67, 48, 120, None, 40, True),
    (1, 64, 96, 32, 32, True),
    (19, 25, 37, 5, None, True),
]
FAR = 1 << 25  # elements from one row to the next, so that those of 70 are beyond 31 bits
needs_memory = pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.mem_get_info()[0] < 32e9, reason="needs a GPU with 32 GB free"
)


@pytest.fixture(autouse=True)
def _setting(monkeypatch):
    """A seed, and uninitialised memory full of NaN."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype)


def inputs(shape: tuple, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    rows, k, n, _, _, bias = shape
    weights = (random(n, k, dtype=dtype, scale=k**-0.5) for _ in range(2))
    # Rows with a stride.
    x = random(rows, 2 * k + 16, dtype=dtype)[:, : 2 * k]
    return x, *weights, random(n, dtype=dtype) if bias else None


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def close(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= factor * TOLERANCE[actual.dtype], f"{float(error):.1e}"  # never for NaN


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape: tuple, dtype: torch.dtype) -> None:
    segments = (shape[3] or shape[1], shape[4] or shape[2])
    args = inputs(shape, dtype)
    expected = _plain_linear(*double(*args), *segments)
    for candidate in launch.linear_candidates(dtype):
        close(candidate.run(*args, *segments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("layout", ["transposed", "different"])
def test_strides_of_weights(layout: str, dtype: torch.dtype) -> None:
    x, ws, wa, bias = inputs(SHAPES[0], dtype)
    ws = ws.t().contiguous().t()
    wa = wa.t().contiguous().t() if layout == "transposed" else wa
    expected = _plain_linear(*double(x, ws, wa, bias), 96, 200)
    for candidate in launch.linear_candidates(dtype):
        close(candidate.run(x, ws, wa, bias, 96, 200), expected)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("shape", "act", "save"),
    [(SHAPES[0], "gelu", True), (SHAPES[1], "gelu", False), (SHAPES[2], "quick_gelu", True)],
)
def test_linear_act(shape: tuple, act: str, save: bool, dtype: torch.dtype) -> None:
    _, k, n, in_segment, _, _ = shape
    in_segment = in_segment or k
    args = inputs(shape, dtype)
    h = _plain_linear(*double(*args), in_segment, n)
    for candidate in launch.act_candidates(dtype):
        y, saved = candidate.run(*args, in_segment, act, save)
        close(y, plain_gelu(h, act))
        if save:
            close(saved, h)
        else:
            assert saved.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", [*SHAPES, (700, 48, 40, None, None, True)])
def test_weight_grad(shape: tuple, dtype: torch.dtype) -> None:
    rows, k, n, in_segment, out_segment, bias = shape
    segments = (in_segment or k, out_segment or n)
    x = random(rows, 2 * k, dtype=dtype)
    grad = random(1, 2 * n, dtype=dtype).expand(rows, -1)  # a gradient as from a sum
    grad = grad if rows == 1 else random(rows, 2 * n + 8, dtype=dtype)[:, 8:]
    expected = _plain_weight_grad(*double(grad, x), *segments, bias)
    for candidate in launch.weight_grad_candidates(dtype):
        got = candidate.run(grad, x, *segments, bias)
        close(got[0], expected[0])
        close(got[1], expected[1])
        if bias:
            close(got[2], expected[2])
        else:
            assert got[2].numel() == 0


@pytest.mark.parametrize("act", [None, "gelu"])
def test_gradients(act: str | None) -> None:
    """Through the operations, with three axes, the interleaved layout on both sides."""
    x = random(3, 11, 160, dtype=HALF)
    ws, wa = (random(120, 80, dtype=HALF, scale=0.1) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x, ws, wa, random(120, dtype=HALF))]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    segments = dict(in_segment=40, out_segment=None if act else 40)
    with tuning.only("triton"):
        y = mirror_linear(*leaves, act=act, **segments)
        grad = random(*y.shape, dtype=HALF)
        y.backward(grad)
    expected = mirror_linear(*exact, act=act, **segments)
    expected.backward(grad.double())
    close(y, expected)
    for leaf, reference in zip(leaves, exact, strict=True):
        close(leaf.grad, reference.grad)


@needs_memory
def test_inputs_beyond_31_bits() -> None:
    _, ws, wa, bias = inputs(SHAPES[0], HALF)
    far = torch.empty(70, FAR, dtype=HALF, device=DEVICE)
    x, grad = far[:, :192].normal_(), far[:, 200:600].normal_()
    h = _plain_linear(*double(x, ws, wa, bias), 96, 200)
    weight_grads = _plain_weight_grad(*double(grad, x), 96, 200, True)
    for candidate in launch.linear_candidates(HALF):
        close(candidate.run(x, ws, wa, bias, 96, 200), h)
    for candidate in launch.act_candidates(HALF):
        close(candidate.run(x, ws, wa, bias, 96, "gelu", False)[0], plain_gelu(h, "gelu"))
    for candidate in launch.weight_grad_candidates(HALF):
        for got, expected in zip(candidate.run(grad, x, 96, 200, True), weight_grads, strict=True):
            close(got, expected)


@needs_memory
def test_results_beyond_31_bits() -> None:
    rows, k, n = (1 << 20) + 9, 16, 1024
    args = inputs((rows, k, n, None, None, True), HALF)
    last = slice(rows - 100, None)
    h = _plain_linear(*double(args[0][last], *args[1:]), k, n)
    for candidate in launch.linear_candidates(HALF):
        close(candidate.run(*args, k, n)[last], h)
    for candidate in launch.act_candidates(HALF):
        y, saved = candidate.run(*args, k, "gelu", True)
        close(y[last], plain_gelu(h, "gelu"))
        close(saved[last], h)


def test_backward_under_autocast_keeps_the_dtype() -> None:
    x, grad = random(70, 96, dtype=torch.float32), random(70, 64, dtype=torch.float32)
    expected = _plain_weight_grad(*double(grad, x), 48, 32, True)
    with torch.autocast(DEVICE, HALF):
        results = [c.run(grad, x, 48, 32, True) for c in launch.weight_grad_candidates(x.dtype)]
        results.append(_plain_weight_grad(grad, x, 48, 32, True))
    for result in results:
        for got, exact in zip(result, expected, strict=True):
            close(got, exact)
    with torch.autocast(DEVICE, HALF):  # sums of a GPU are float32 there unless told
        half = _plain_weight_grad(grad.to(HALF), x.to(HALF), 48, 32, True)
    assert {t.dtype for t in half} == {HALF}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode) -> None:
    args = inputs(SHAPES[0], torch.float32)
    expected = plain_gelu(_plain_linear(*double(*args), 96, 200), "gelu")
    with mode(), tuning.only("triton"):
        close(mirror_linear(*args, act="gelu"), expected)


def test_compiled_whole() -> None:
    args = [t.requires_grad_() for t in inputs(SHAPES[0], torch.float32)]

    def f(*args: Tensor) -> Tensor:
        return mirror_linear(mirror_linear(*args, act="gelu"), args[1].t(), args[2].t())

    expected = f(*args)
    gradients = torch.autograd.grad(expected.sum(), args[1:])
    with tuning.only("triton"):
        y = torch.compile(f, fullgraph=True, backend="aot_eager")(*args)
        got = torch.autograd.grad(y.sum(), args[1:])
    close(y, expected.double())
    for a, e in zip(got, gradients, strict=True):
        close(a, e.double(), 2)


def test_agree_in_the_tuner(monkeypatch) -> None:
    """As users get there: every candidate of the operations passes its check."""
    tuner = tuning.Tuner(timer=lambda run, best: float(run() is None), timing_allowed=bool)
    monkeypatch.setattr(tuning, "run", tuner.run)
    x, ws, wa, bias = (t.requires_grad_() for t in inputs(SHAPES[0], torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for act in (None, "gelu"):
            mirror_linear(x, ws, wa, bias, act=act).square().sum().backward()
    decisions = {d.op: d.milliseconds for d in tuner.report()}
    assert set(decisions) == {
        "mirror_linear",
        "mirror_linear_act",
        "mirror_linear_weight_grad",
        "mirror_gelu_backward",
    }
    for times in decisions.values():
        assert "plain" in times
        assert any(name.startswith("triton_") for name in times)
