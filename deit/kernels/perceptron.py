"""The perceptron of packed features as one operation with one intermediate result for backward.

Backward needs the argument of the nonlinearity and recomputes its result, in one pass over memory:
half of what the two linear maps would keep between them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deit.kernels.backends import compiles_directly
from deit.kernels.gelu import _gelu_backward_op, _gelu_op, check_activation
from deit.kernels.linear import _linear_act_op, _linear_op, cast, check_parameters, gradients

__all__ = ["mirror_perceptron"]


def mirror_perceptron(
    x: Tensor,
    first: tuple[Tensor, Tensor],
    first_bias: Tensor | None,
    second: tuple[Tensor, Tensor],
    second_bias: Tensor | None,
    act: str,
) -> Tensor:
    """Two linear maps of packed features with the nonlinearity between them.

    Args:
        x: (..., 2K), packed.
        first, second: the weights of the symmetric and the antisymmetric part, (H, K) and (N, H).
        first_bias, second_bias: (H,) and (N,), added to the symmetric part; or None.
        act: "gelu" or "quick_gelu".

    Returns:
        (..., 2N), contiguous, in the autocast dtype under autocast.

    Raises:
        ValueError: if shapes or dtypes do not fit or `act` is unknown.
    """
    check_activation(act)
    direct, biases = compiles_directly(x), (first_bias, second_bias)
    x, weights, biases = cast(x, (*first, *second), biases, direct)
    first, second = (*weights[:2], biases[0]), (*weights[2:], biases[1])
    check_parameters(x.shape[-1], x.dtype, *first, direct)
    check_parameters(2 * first[0].shape[0], x.dtype, *second, direct)
    tensors = (x, *first, *second)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)
    ops = torch.ops.deit
    perceptron = ops.direct_perceptron if direct else ops.mirror_perceptron
    return perceptron(*tensors, act, save)[0]


@torch.library.custom_op("deit::mirror_perceptron", mutates_args=())
def _perceptron_op(
    x: Tensor,
    first_sym: Tensor,
    first_asym: Tensor,
    first_bias: Tensor | None,
    second_sym: Tensor,
    second_asym: Tensor,
    second_bias: Tensor | None,
    act: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """-> the result and, if `save`, the argument of the nonlinearity; else empty."""
    hidden, width = first_sym.shape
    y, h = _linear_act_op(x, first_sym, first_asym, first_bias, width, act, save)
    out = _linear_op(y, second_sym, second_asym, second_bias, hidden, second_sym.shape[0])
    return out, h


@_perceptron_op.register_fake
def _(x, first_sym, first_asym, first_bias, second_sym, second_asym, second_bias, act, save):
    lead = x.shape[:-1]
    h = x.new_empty(*lead, 2 * first_sym.shape[0]) if save else x.new_empty(0)
    return x.new_empty(*lead, 2 * second_sym.shape[0]), h


def _setup(ctx, inputs, output) -> None:
    x, first_sym, first_asym, _, second_sym, second_asym, _, ctx.act, save = inputs
    ctx.set_materialize_grads(False)
    weights = (first_sym, first_asym, second_sym, second_asym)
    ctx.save_for_backward(x, *weights, *(output[1:] if save else ()))


def _backward(ctx, grad: Tensor | None, grad_saved: Tensor | None) -> tuple:
    x, *weights, h = ctx.saved_tensors
    first, second = weights[:2], weights[2:]
    (hidden, width), out = first[0].shape, second[0].shape[0]
    of_first, of_second = ctx.needs_input_grad[:4], ctx.needs_input_grad[4:7]
    d_first, d_second = (None,) * 4, (None,) * 3
    dh = grad_saved  # there for gradients of second order only
    if grad is not None:
        y = _gelu_op(h, ctx.act) if any(of_second) else h  # or nothing that is read
        needed = (any(of_first), *of_second)
        dy, *d_second = gradients(grad, y, second, (hidden, out), needed)
        del y  # the largest tensors of a network go after their last use
        if dy is not None:
            total = _gelu_backward_op(dy, h, ctx.act)
            dh = total if dh is None else dh + total
        del dy
    if dh is not None:
        d_first = gradients(dh, x, first, (width, hidden), of_first)
    return (*d_first, *d_second, None, None)


_perceptron_op.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.deit.mirror_perceptron)
def _flops(x_shape, first_shape, first_asym, first_bias, second_shape, *args, **kwargs) -> int:
    rows = torch.Size(x_shape[:-1]).numel()
    return 4 * rows * (first_shape[0] * first_shape[1] + second_shape[0] * second_shape[1])
