from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deit.kernels import linear as kernels
from deit.kernels.linear import mirror_linear
from deit.layers.activation import GELU
from deit.layers.linear import Linear

K, N = 12, 8


def test_interpreted(run_kernel_tests) -> None:
    run_kernel_tests("kernels_on_linear.py", "cpu")


@pytest.mark.gpu
def test_on_a_gpu(run_kernel_tests) -> None:
    run_kernel_tests("kernels_on_linear.py", "cuda")


def inputs(dtype: torch.dtype = torch.float64, bias: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(3, 5, 2 * K), (N, K), (N, K), *([(N,)] if bias else [])]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def interleave(x: Tensor, segment: int) -> Tensor:
    """Packed -> segments of both irreps side by side."""
    return x.unflatten(-1, (2, -1, segment)).transpose(-2, -3).flatten(-3)


@pytest.mark.parametrize("act", [None, "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_layer(act: str | None, bias: bool) -> None:
    x, *parameters = inputs(bias=bias)
    layer = Linear(2 * K, 2 * N, bias=bias).double()
    names = ["linear_sym.weight", "linear_asym.weight", "linear_sym.bias"][: len(parameters)]
    layer.load_state_dict(dict(zip(names, parameters, strict=True)))
    expected = layer(x) if act is None else GELU(2 * N)(layer(x))
    torch.testing.assert_close(mirror_linear(x, *parameters, act=act), expected)


@pytest.mark.parametrize(("in_segment", "out_segment"), [(3, None), (None, 2), (6, 4), (1, 1)])
def test_segments_only_move_channels(in_segment: int | None, out_segment: int | None) -> None:
    x, *parameters = inputs()
    segments = dict(in_segment=in_segment, out_segment=out_segment)
    got = mirror_linear(interleave(x, in_segment or K), *parameters, **segments)
    expected = interleave(mirror_linear(x, *parameters), out_segment or N)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("options", [dict(in_segment=3, out_segment=2), dict(act="gelu")])
def test_gradients_of_both_orders(options: dict) -> None:
    args = inputs()
    assert torch.autograd.gradcheck(lambda *a: mirror_linear(*a, **options), args)
    assert torch.autograd.gradgradcheck(lambda *a: mirror_linear(*a, **options), args)


def test_batched_product_is_the_plain_one() -> None:
    x, *parameters = (t.detach() for t in inputs())
    grad = torch.randn(3, 5, 2 * N, dtype=x.dtype).flatten(0, 1)
    x = x.flatten(0, 1)
    torch.testing.assert_close(
        kernels._batched_linear(x, *parameters, K, N), kernels._plain_linear(x, *parameters, K, N)
    )
    torch.testing.assert_close(
        kernels._batched_weight_grad(grad, x, K, N, True),
        kernels._plain_weight_grad(grad, x, K, N, True),
    )


@pytest.mark.parametrize("act", [None, "gelu"])
def test_frozen_parameters_get_no_gradient(act: str | None) -> None:
    x, ws, wa, bias = inputs()
    y = mirror_linear(x, ws.detach(), wa, bias.detach(), act=act)
    assert torch.autograd.grad(y.sum(), [x, wa])[1].shape == (N, K)
    assert not mirror_linear(*(t.detach() for t in (x, ws, wa, bias)), act=act).requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    args = inputs()

    def two(x: Tensor, ws: Tensor, wa: Tensor, bias: Tensor) -> Tensor:
        return mirror_linear(mirror_linear(x, ws, wa, bias, act="gelu"), ws.t(), wa.t())

    expected = torch.autograd.grad(two(*args).square().sum(), args)
    checkpoint(two, *args, use_reentrant=reentrant).square().sum().backward()
    for t, gradient in zip(args, expected, strict=True):
        torch.testing.assert_close(t.grad, gradient)


def test_autocast_casts_everything() -> None:
    args = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mirror_linear(*args, act="gelu")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in args)
    expected = mirror_linear(*(t.detach() for t in args), act="gelu")
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_operations_are_well_formed() -> None:
    x, ws, wa, bias = inputs()
    ops = torch.ops.deit
    torch.library.opcheck(ops.mirror_linear.default, (x, ws, wa, bias, 3, 2))
    torch.library.opcheck(ops.mirror_linear.default, (x[:, 1:], ws, wa, None, K, N))
    torch.library.opcheck(ops.mirror_linear_act.default, (x, ws, wa, bias, K, "gelu", True))
    frozen = [t.detach() for t in (x, ws, wa, bias)]
    torch.library.opcheck(ops.mirror_linear_act.default, (*frozen, 3, "quick_gelu", False))
    grad = torch.randn(3, 5, 2 * N, dtype=x.dtype, requires_grad=True)
    torch.library.opcheck(ops.mirror_linear_weight_grad.default, (grad, x, 3, 2, True))
    torch.library.opcheck(ops.mirror_linear_weight_grad.default, (grad, x, K, N, False))


def test_flops_are_counted() -> None:
    args = inputs()
    with FlopCounterMode(display=False) as counter:
        y = mirror_linear(*args, act="gelu")
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * 15 * 2 * N * K
    assert counter.get_total_flops() == 3 * forward


def test_rejects_what_does_not_fit() -> None:
    x, ws, wa, bias = (t.detach() for t in inputs())
    with pytest.raises(ValueError, match="do not fit"):
        mirror_linear(x[..., 1:], ws, wa, bias)
    with pytest.raises(ValueError, match="do not fit"):
        mirror_linear(x, ws, wa[1:], bias)
    with pytest.raises(ValueError, match="in_segment 5 must divide 12"):
        mirror_linear(x, ws, wa, bias, in_segment=5)
    with pytest.raises(ValueError, match="one floating dtype"):
        mirror_linear(x, ws, wa, bias.float())
    with pytest.raises(ValueError, match="packed result"):
        mirror_linear(x, ws, wa, bias, out_segment=2, act="gelu")
    with pytest.raises(ValueError, match="'relu'"):
        mirror_linear(x, ws, wa, bias, act="relu")


def test_no_rows() -> None:
    x, *parameters = inputs()
    y = mirror_linear(x[:0], *parameters, act="gelu")
    y.sum().backward()
    assert y.shape == (0, 5, 2 * N)
    assert all((p.grad == 0).all() for p in parameters)
