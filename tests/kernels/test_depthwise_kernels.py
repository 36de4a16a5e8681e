from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deit.equivariance import randomize_
from deit.kernels.depthwise import exchange, mirror_depthwise, whole_kernel
from deit.layers.conv import MirrorDepthwiseConv2d


def test_interpreted(run_kernel_tests) -> None:
    run_kernel_tests("kernels_on_depthwise.py", "cpu")


@pytest.mark.gpu
def test_on_a_gpu(run_kernel_tests) -> None:
    run_kernel_tests("kernels_on_depthwise.py", "cuda")


def layer_arguments(layer: MirrorDepthwiseConv2d) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole kernels and the biases of all four quarters."""
    parts = [layer.sym_to_sym, layer.sym_to_asym, layer.asym_to_sym, layer.asym_to_asym]
    kernels = [part.kernel() for part in parts]
    biases = [
        k[:, 0, 0, 0] * 0 if p.bias is None else p.bias for p, k in zip(parts, kernels, strict=True)
    ]
    return torch.cat(kernels), torch.cat(biases)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_is_the_layer(size: int) -> None:
    layer = randomize_(MirrorDepthwiseConv2d(12, size, dtype=torch.float64))
    x = torch.randn(2, 5, 8, 12, dtype=torch.float64, requires_grad=True)
    expected = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    kernel, bias = layer_arguments(layer)
    leaves = [x, *layer.parameters()]
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, leaves, grad, retain_graph=True)
    for stored in (kernel, kernel[..., : size // 2 + 1]):
        actual = mirror_depthwise(x, stored, bias)
        torch.testing.assert_close(actual, expected)
        assert actual.is_contiguous()
        actual = torch.autograd.grad(actual, leaves, grad, retain_graph=True)
        torch.testing.assert_close(actual, gradients)


def test_the_other_half_is_not_read() -> None:
    x, kernel = torch.randn(1, 4, 6, 8), torch.randn(8, 1, 3, 3, requires_grad=True)
    y = mirror_depthwise(x, kernel)
    (gradient,) = torch.autograd.grad(y.square().sum(), kernel)
    assert gradient[..., :2].abs().min() > 0
    assert gradient[..., 2].abs().max() == 0
    with torch.no_grad():
        kernel[..., 2] = torch.nan
        assert torch.equal(mirror_depthwise(x, kernel), y)


def test_gradients_of_both_orders() -> None:
    shapes = ((2, 3, 4, 4), (4, 1, 3, 2), (4,))
    args = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(mirror_depthwise, args)
    assert torch.autograd.gradgradcheck(mirror_depthwise, args)


def test_kernels_are_mirrored_and_quarters_exchanged() -> None:
    kernel = whole_kernel(torch.randn(3, 2, 8))
    signs = torch.tensor([1, 1, -1, -1, -1, -1, 1, 1])[:, None, None, None]
    assert torch.equal(kernel[..., 2], (kernel * signs)[..., 0])
    x = torch.arange(8)
    assert exchange(x).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert torch.equal(exchange(exchange(x)), x)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_operation_is_well_formed(order: tuple[int, ...]) -> None:
    sizes = [(2, 3, 5, 8)[i] for i in order]
    x = torch.randn(sizes).permute([order.index(i) for i in range(4)]).requires_grad_()
    taps, bias = torch.randn(3, 2, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    ops, grad = torch.ops.deit, torch.randn(2, 3, 5, 8)
    for shift in (bias, None):
        args = (x, taps, shift, torch.float32)
        torch.library.opcheck(ops.mirror_depthwise.default, args)
    torch.library.opcheck(ops.mirror_depthwise_input.default, (grad, taps, torch.float32))
    torch.library.opcheck(ops.mirror_depthwise_taps.default, (grad, x, 3))


def test_counts_the_operations_of_the_convolution() -> None:
    x, kernel = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(8, 1, 3, 2)
    with FlopCounterMode(display=False) as counter:
        y = mirror_depthwise(x, kernel.requires_grad_())
        assert counter.get_total_flops() == 2 * y.numel() * 9
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * y.numel() * 9


def test_dtypes() -> None:
    x, kernel = torch.randn(1, 4, 6, 8), torch.randn(8, 1, 3, 2, requires_grad=True)
    assert mirror_depthwise(x.half(), kernel).dtype == torch.float16
    y = mirror_depthwise(x.requires_grad_(), kernel, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().sum(), (x, kernel))
    assert [g.dtype for g in gradients] == [torch.float32] * 2
    with torch.autocast("cpu", torch.bfloat16):  # casting is left to the caller
        assert torch.equal(mirror_depthwise(x, kernel), mirror_depthwise(x, kernel, None))
        assert mirror_depthwise(x, kernel).dtype == torch.float32


def test_rejects_what_does_not_fit() -> None:
    x, kernel = torch.randn(1, 4, 6, 8), torch.randn(8, 1, 3, 3)
    with pytest.raises(ValueError, match="multiple of 4"):
        mirror_depthwise(x[..., :6], kernel[:6])
    with pytest.raises(ValueError, match="multiple of 4"):
        mirror_depthwise(x[0], kernel)
    with pytest.raises(ValueError, match="odd k"):
        mirror_depthwise(x, torch.randn(8, 1, 4, 4))
    with pytest.raises(ValueError, match=r"\(8, 1, k, k\)"):
        mirror_depthwise(x, kernel[:4])
    with pytest.raises(ValueError, match="bias must have 8"):
        mirror_depthwise(x, kernel, torch.randn(4))
