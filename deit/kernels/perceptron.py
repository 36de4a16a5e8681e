"""The perceptron of packed features as one operation with one intermediate result for backward.

Backward needs the argument of the nonlinearity and recomputes its result, in one pass over memory:
half of what the two linear maps would keep between them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deit.kernels.backends import compiles_directly
from deit.kernels.gelu import _gelu_backward_op, _gelu_op
from deit.kernels.linear import _linear_act_op, _linear_op, _weight_grad_op

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
    """
    tensors = (x, *first, first_bias, *second, second_bias)
    device, direct = x.device.type, compiles_directly(x)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        # kernels that are launched directly add a bias of any dtype, and casts are launches
        kept = (None, first_bias, second_bias) if direct else (None,)
        tensors = tuple(t if any(t is k for k in kept) else t.to(dtype) for t in tensors)
    present = [t for t in tensors if t is not None]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in present)
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


def _linear_gradients(
    grad: Tensor, x: Tensor, sym: Tensor, asym: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of a packed linear map: the gradients of x, both weights and the bias."""
    n, k = sym.shape
    dx = _linear_op(grad, sym.t(), asym.t(), None, n, k)
    d_sym, d_asym, d_bias = _weight_grad_op(grad, x, k, n, with_bias)
    return dx, d_sym, d_asym, d_bias if with_bias else None


def _backward(ctx, grad: Tensor | None, grad_saved: Tensor | None) -> tuple:
    x, first_sym, first_asym, second_sym, second_asym, h = ctx.saved_tensors
    second = (None,) * 3
    total = grad_saved  # there for gradients of second order only
    if grad is not None:
        y = _gelu_op(h, ctx.act)
        dy, *second = _linear_gradients(grad, y, second_sym, second_asym, ctx.needs_input_grad[6])
        dh = _gelu_backward_op(dy, h, ctx.act)
        total = dh if total is None else total + dh
    if total is None:
        return (None,) * 9
    first = _linear_gradients(total, x, first_sym, first_asym, ctx.needs_input_grad[3])
    return (*first, *second, None, None)


_perceptron_op.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.deit.mirror_perceptron)
def _flops(x_shape, first_shape, first_asym, first_bias, second_shape, *args, **kwargs) -> int:
    rows = torch.Size(x_shape[:-1]).numel()
    return 4 * rows * (first_shape[0] * first_shape[1] + second_shape[0] * second_shape[1])
