from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deit.kernels import linear as kernels
from deit.kernels.linear import mirror_linear
from deit.kernels.perceptron import mirror_perceptron
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


@pytest.mark.parametrize(("act", "bias"), [(None, True), ("gelu", False)])
def test_backward_under_autocast_has_the_dtype_of_forward(act: str | None, bias: bool) -> None:
    args = inputs(torch.float32, bias)
    y = mirror_linear(*args, act=act)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, args, grad, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(y, args, grad)
        rows = grad.flatten(0, 1), args[0].detach().flatten(0, 1)
        batched = kernels._batched_weight_grad(*rows, K, N, bias)
    torch.testing.assert_close(gradients, expected)
    assert all(t.dtype == torch.float32 for t in batched)


def test_autocast_leaves_float64_alone() -> None:
    x, *args = parameters_of_a_perceptron()
    with torch.autocast("cpu", torch.bfloat16):
        assert mirror_linear(x, *args[0], args[1]).dtype == torch.float64
        assert mirror_perceptron(x, *args).dtype == torch.float64


def parameters_of_a_perceptron(dtype: torch.dtype = torch.float64) -> tuple:
    """The arguments of `mirror_perceptron`."""
    x, ws, wa, bias = inputs(dtype)
    vs, va, shift = (torch.randn(shape, dtype=dtype) for shape in [(6, N), (6, N), (6,)])
    return x, (ws, wa), bias, (vs, va), shift, "quick_gelu"


def test_perceptron_is_two_linear_maps_in_both_orders() -> None:
    x, first, b, second, c, act = parameters_of_a_perceptron()
    leaves = [t.requires_grad_() for t in (x, *first, b, *second, c)]

    def fused(x, ws, wa, b, vs, va, c):
        return mirror_perceptron(x, (ws, wa), b, (vs, va), c, act)

    def both(x, ws, wa, b, vs, va, c):
        return mirror_linear(mirror_linear(x, ws, wa, b, act=act), vs, va, c)

    torch.testing.assert_close(fused(*leaves), both(*leaves))
    assert torch.autograd.gradcheck(fused, leaves)
    assert torch.autograd.gradgradcheck(fused, leaves)
    # Several pairs of rows and of frozen parameters: which products are left out differs.
    for trained in [(0,), (1, 3), (4,), (6,), (2, 5), (0, 6)]:
        args = [t.detach().requires_grad_(i in trained) for i, t in enumerate(leaves)]
        wanted = [args[i] for i in trained]
        gradients = [
            torch.autograd.grad(f(*args).square().sum(), wanted, create_graph=True)
            for f in (fused, both)
        ]
        torch.testing.assert_close(*gradients)
        again = [torch.autograd.grad(sum(t.square().sum() for t in g), wanted) for g in gradients]
        torch.testing.assert_close(*again)


def test_perceptron_leaves_products_out_that_nobody_asked_for() -> None:
    x, first, b, second, c, act = parameters_of_a_perceptron()
    one, two = 15 * 4 * N * K, 15 * 4 * N * 6
    for trained, expected in [
        ((x,), one + two),
        ((*first,), one + two),
        ((b, second[0]), one + 2 * two),
        ((c,), two),
    ]:
        for t in (x, *first, b, *second, c):
            t.requires_grad_(any(t is other for other in trained))
        y = mirror_perceptron(x, first, b, second, c, act)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == expected


def test_perceptron_rejects_what_does_not_fit() -> None:
    x, first, b, second, c, _ = parameters_of_a_perceptron()
    with pytest.raises(ValueError, match="do not fit"):
        mirror_perceptron(x[..., 2:], first, b, second, c, "gelu")
    with pytest.raises(ValueError, match="width 16, weights of shapes \\(6, 7\\)"):
        mirror_perceptron(x, first, b, [v[:, 1:] for v in second], c, "gelu")
    with pytest.raises(ValueError, match="do not fit"):
        mirror_perceptron(x, first, b, second, c[1:], "gelu")
    with pytest.raises(ValueError, match="one floating dtype"):
        mirror_perceptron(x, first, b.float(), second, c, "gelu")
    with pytest.raises(ValueError, match="'relu'"):
        mirror_perceptron(x, first, b, second, c, "relu")


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
