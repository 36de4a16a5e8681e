from __future__ import annotations

import pytest
import torch

from deit.equivariance import randomize_
from deit.kernels.layer_norm import mirror_layer_norm
from deit.layers.norm import LayerNorm


def test_interpreted(run_kernel_tests) -> None:
    run_kernel_tests("kernels_on_layer_norm.py", "cpu")


@pytest.mark.gpu
def test_on_a_gpu(run_kernel_tests) -> None:
    run_kernel_tests("kernels_on_layer_norm.py", "cuda")


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_is_the_layer(eps: float) -> None:
    layer = randomize_(LayerNorm(20, eps, dtype=torch.float64))
    x = 2 + 3 * torch.randn(2, 7, 20, dtype=torch.float64)
    scale, offset = layer.scaling.scale(), layer.scaling.offset()
    torch.testing.assert_close(mirror_layer_norm(x, scale, offset, eps), layer(x))


def test_gradients_of_both_orders() -> None:
    shapes = ((3, 8), (8,), (8,))
    args = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *a: mirror_layer_norm(*a, 0.1), args)
    assert torch.autograd.gradgradcheck(lambda *a: mirror_layer_norm(*a, 0.1), args)


def test_moments_of_half_precision_are_float32() -> None:
    x, weight, bias = 10 + torch.randn(64, 32), torch.randn(32), torch.randn(32)
    x = x.to(torch.bfloat16)
    exact = mirror_layer_norm(x.double(), weight.double(), bias.double())
    result = mirror_layer_norm(x, weight, bias, dtype=torch.float32)
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)
    assert mirror_layer_norm(x, weight, bias).dtype == torch.bfloat16


def test_autocast_changes_nothing() -> None:
    x, weight, bias = torch.randn(5, 8), torch.randn(8), torch.randn(8)
    expected = mirror_layer_norm(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mirror_layer_norm(x, weight, bias), expected)


@pytest.mark.parametrize("x", [torch.randn(3, 8, requires_grad=True), torch.randn(8, 2, 3).mT])
def test_operation_is_well_formed(x: torch.Tensor) -> None:
    vectors = [torch.randn(x.shape[-1], requires_grad=x.requires_grad) for _ in range(2)]
    args = (x, *vectors, 1e-6, torch.bfloat16)
    torch.library.opcheck(torch.ops.deit.mirror_layer_norm.default, args)
    y, moments = torch.ops.deit.mirror_layer_norm(*args)
    args = (y.detach(), x, vectors[0], moments.detach(), 1e-6)
    torch.library.opcheck(torch.ops.deit.mirror_layer_norm_backward.default, args)


def test_rejects_what_does_not_fit() -> None:
    vector = torch.randn(4)
    with pytest.raises(ValueError, match="even last axis"):
        mirror_layer_norm(torch.randn(2, 3), vector, vector)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        mirror_layer_norm(torch.ones(2, 4, dtype=torch.int64), vector, vector)
    with pytest.raises(ValueError, match="must have 6 elements"):
        mirror_layer_norm(torch.randn(2, 6), vector, vector)
