"""The fused operations for `torch.compile`: kernels that the compiled code launches by itself.

The operations of linear.py, gelu.py and perceptron.py are opaque to a compiler: each call goes
through the dispatcher, the tuner and Triton's launcher, all Python, tens of microseconds that a
small network's GPU does not have. The twins here are taken apart while they are compiled, into
Triton kernels and torch's own products; direct_plans.py decides which. They take the same arguments
and give the same results, except that biases may be of any dtype.

Imported on first use, by `deit.kernels.gpu.trust_compiler`, since it needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.utils.flop_counter import register_flop_formula

from deit.kernels import direct_plans as plans
from deit.kernels import linear, linear_launch, perceptron
from deit.kernels.gelu import as_rows, plain_gelu, plain_gelu_backward
from deit.kernels.gelu_triton import TILES, gelu_backward_kernel, gelu_kernel
from deit.kernels.linear_triton import linear_act_kernel, linear_kernel, weight_grad_kernel

__all__: list[str] = []


# --- formulas on rows, which a compiler follows ------------------------------------------------
# `wrap_triton` stands beside each kernel's name because torch reads these functions' source to find
# the kernels that compiled code in its caches depends on.


def _tile(plan: str) -> tuple[int, int, int]:
    rows, columns, warps = map(int, plan.removeprefix("triton_").split("x"))
    return rows, columns, warps


def _cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def _gelu_by(plan: str, x: Tensor, act: str) -> Tensor:
    if plan == "plain":
        return plain_gelu(x, act)
    (rows, width), (height, columns, warps) = x.shape, _tile(plan)
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    grid = (_cdiv(rows, height) * _cdiv(width // 2, columns),)
    wrap_triton(gelu_kernel)[grid](
        x,
        y,
        rows,
        width // 2,
        x.stride(0),
        QUICK=act == "quick_gelu",
        ROWS=height,
        COLUMNS=columns,
        num_warps=warps,
    )
    return y


def _gelu_backward_by(plan: str, grad: Tensor, x: Tensor, act: str) -> Tensor:
    if plan == "plain":
        return plain_gelu_backward(grad, x, act)
    (rows, width), (height, columns, warps) = x.shape, _tile(plan)
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    grid = (_cdiv(rows, height) * _cdiv(width // 2, columns),)
    wrap_triton(gelu_backward_kernel)[grid](
        grad,
        x,
        dx,
        rows,
        width // 2,
        grad.stride(0),
        x.stride(0),
        QUICK=act == "quick_gelu",
        ROWS=height,
        COLUMNS=columns,
        num_warps=warps,
    )
    return dx


def _linear_by(
    plan: str,
    x: Tensor,
    ws: Tensor,
    wa: Tensor,
    bias: Tensor | None,
    in_segment: int,
    out_segment: int,
) -> Tensor:
    args = (x, ws, wa, bias, in_segment, out_segment)
    if not plan.startswith("triton"):
        return plans.library_linear(plan == "batched", *args)
    config = linear_launch.config_of(plan)
    return linear_launch.linear(*args, config, wrap_triton(linear_kernel))


def _linear_act_by(
    plan: str,
    x: Tensor,
    ws: Tensor,
    wa: Tensor,
    bias: Tensor | None,
    in_segment: int,
    act: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    if plan.startswith("triton"):
        config, kernel = linear_launch.config_of(plan), wrap_triton(linear_act_kernel)
        return linear_launch.linear_act(x, ws, wa, bias, in_segment, act, save, config, kernel)
    h = plans.library_linear(plan.startswith("batched"), x, ws, wa, bias, in_segment, len(ws))
    if not save:  # the compiler does all of it in one pass over the products
        return plain_gelu(h, act), h.new_empty(0)
    tile = "plain" if plan == "plain" else "x".join(map(str, TILES[0]))
    return _gelu_by(tile, h, act), h


def _weight_grad_by(
    plan: str, grad: Tensor, x: Tensor, in_segment: int, out_segment: int
) -> Tensor:
    args = (grad, x, in_segment, out_segment)
    if not plan.startswith("triton"):
        return plans.library_weight_grad(plan == "batched", *args)
    config = linear_launch.config_of(plan)
    kernel = wrap_triton(weight_grad_kernel)
    return linear_launch.weight_grad_parts(*args, config, kernel).sum(0).to(x.dtype)


# --- operations -------------------------------------------------------------------------------


def _linear(
    x: Tensor, ws: Tensor, wa: Tensor, bias: Tensor | None, in_segment: int, out_segment: int
) -> Tensor:
    args = (as_rows(x), ws, wa, bias, in_segment, out_segment)
    return _linear_by(plans.linear_plan(*args), *args).view(*x.shape[:-1], 2 * len(ws))


def _linear_act(
    x: Tensor,
    ws: Tensor,
    wa: Tensor,
    bias: Tensor | None,
    in_segment: int,
    act: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    args = (as_rows(x), ws, wa, bias, in_segment, act, save)
    y, h = _linear_act_by(plans.act_plan(*args), *args)
    shape = (*x.shape[:-1], 2 * len(ws))
    return y.view(shape), h.view(shape) if save else h


@triton_op("deit::direct_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    weight_sym: Tensor,
    weight_asym: Tensor,
    bias: Tensor | None,
    in_segment: int,
    out_segment: int,
) -> Tensor:
    return _linear(x, weight_sym, weight_asym, bias, in_segment, out_segment)


@triton_op("deit::direct_linear_act", mutates_args=())
def _linear_act_op(
    x: Tensor,
    weight_sym: Tensor,
    weight_asym: Tensor,
    bias: Tensor | None,
    in_segment: int,
    act: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    return _linear_act(x, weight_sym, weight_asym, bias, in_segment, act, save)


@triton_op("deit::direct_weight_grad", mutates_args=())
def _weight_grad_op(grad: Tensor, x: Tensor, in_segment: int, out_segment: int) -> Tensor:
    """-> the gradients of both weights, (2, N, K)."""
    args = (as_rows(grad), as_rows(x), in_segment, out_segment)
    return _weight_grad_by(plans.weight_grad_plan(*args), *args)


@triton_op("deit::direct_gelu", mutates_args=())
def _gelu_op(x: Tensor, act: str) -> Tensor:
    rows = as_rows(x)
    return _gelu_by(plans.gelu_plan(rows, act), rows, act).view(x.shape)


@triton_op("deit::direct_gelu_backward", mutates_args=())
def _gelu_backward_op(grad: Tensor, x: Tensor, act: str) -> Tensor:
    rows = as_rows(x)
    plan = plans.gelu_backward_plan(rows, act)
    return _gelu_backward_by(plan, as_rows(grad), rows, act).view(x.shape)


@triton_op("deit::direct_perceptron", mutates_args=())
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
    hidden, width = first_sym.shape
    y, h = _linear_act(x, first_sym, first_asym, first_bias, width, act, save)
    return _linear(y, second_sym, second_asym, second_bias, hidden, len(second_sym)), h


# Shapes alone: nothing is measured for them.
@_linear_op.register_fake
def _(x, weight_sym, weight_asym, bias, in_segment, out_segment):
    return x.new_empty(*x.shape[:-1], 2 * weight_sym.shape[0])


@_linear_act_op.register_fake
def _(x, weight_sym, weight_asym, bias, in_segment, act, save):
    y = x.new_empty(*x.shape[:-1], 2 * weight_sym.shape[0])
    return y, torch.empty_like(y) if save else x.new_empty(0)


@_weight_grad_op.register_fake
def _(grad, x, in_segment, out_segment):
    return grad.new_empty(2, grad.shape[-1] // 2, x.shape[-1] // 2)


@_gelu_op.register_fake
def _(x, act):
    return x.new_empty(x.shape)


@_gelu_backward_op.register_fake
def _(grad, x, act):
    return x.new_empty(x.shape)


@_perceptron_op.register_fake
def _(x, first_sym, first_asym, first_bias, second_sym, second_asym, second_bias, act, save):
    lead = x.shape[:-1]
    h = x.new_empty(*lead, 2 * first_sym.shape[0]) if save else x.new_empty(0)
    return x.new_empty(*lead, 2 * second_sym.shape[0]), h


# --- gradients, of first order: those of second order raise ------------------------------------


def _in_memory(grad: Tensor) -> Tensor:
    """A gradient that several kernels read: inductor would compute and write it for each."""
    force = getattr(torch.ops.prims, "inductor_force_stride_order", None)
    if force is None or not grad.is_contiguous():
        return grad.contiguous()
    return force(grad, grad.stride())


def _gradients(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    segments: tuple[int, int],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Of x, both weights and the bias; `needed` says which."""
    sym, asym = weights
    in_segment, out_segment = segments
    dx = d_sym = d_asym = d_bias = None
    grad = _in_memory(grad)
    if needed[0]:
        dx = _linear_op(grad, sym.t(), asym.t(), None, out_segment, in_segment)
    if needed[1] or needed[2]:
        d_sym, d_asym = _weight_grad_op(grad, x, in_segment, out_segment).unbind(0)
    if needed[3]:
        parts = grad.reshape(-1, grad.shape[-1]).unflatten(1, (-1, 2, out_segment))
        d_bias = parts[:, :, 0].sum(0, dtype=torch.float32).flatten()  # autograd casts it
    return dx, d_sym, d_asym, d_bias


def _setup(ctx, inputs, output) -> None:
    ctx.segments = inputs[4:]
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx, grad: Tensor) -> tuple:
    x, *weights = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    return (*_gradients(grad, x, weights, ctx.segments, needed), None, None)


def _act_setup(ctx, inputs, output) -> None:
    ctx.in_segment, ctx.act, save = inputs[4:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *(output[1:] if save else ()))


def _before_act(grad: Tensor | None, grad_saved: Tensor | None, h: Tensor, act: str) -> Tensor:
    """The gradient of `h`, which is a result of its own too."""
    if grad is None:
        return torch.zeros_like(h) if grad_saved is None else grad_saved
    dh = _gelu_backward_op(grad, h, act)
    return dh if grad_saved is None else dh + grad_saved


def _act_backward(ctx, grad: Tensor | None, grad_saved: Tensor | None) -> tuple:
    x, *weights, h = ctx.saved_tensors
    dh = _before_act(grad, grad_saved, h, ctx.act)
    segments, needed = (ctx.in_segment, h.shape[-1] // 2), ctx.needs_input_grad[:4]
    return (*_gradients(dh, x, weights, segments, needed), None, None, None)


def _perceptron_backward(ctx, grad: Tensor | None, grad_saved: Tensor | None) -> tuple:
    x, *first, second_sym, second_asym, h = ctx.saved_tensors
    (hidden, width), out = first[0].shape, second_sym.shape[0]
    needed = ctx.needs_input_grad
    dy, d_second = None, (None,) * 3
    if grad is not None:
        y = _gelu_op(h, ctx.act)
        weights, wanted = (second_sym, second_asym), (True, *needed[4:7])
        dy, *d_second = _gradients(grad, y, weights, (hidden, out), wanted)
    dh = _before_act(dy, grad_saved, h, ctx.act)
    d_first = _gradients(dh, x, first, (width, hidden), needed[:4])
    return (*d_first, *d_second, None, None)


def _gelu_setup(ctx, inputs, output) -> None:
    x, ctx.act = inputs
    ctx.save_for_backward(x)


def _gelu_backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    return _gelu_backward_op(grad, *ctx.saved_tensors, ctx.act), None


_linear_op.register_autograd(_backward, setup_context=_setup)
_linear_act_op.register_autograd(_act_backward, setup_context=_act_setup)
_perceptron_op.register_autograd(_perceptron_backward, setup_context=perceptron._setup)
_gelu_op.register_autograd(_gelu_backward, setup_context=_gelu_setup)

register_flop_formula(torch.ops.deit.direct_linear)(linear._linear_flops)
register_flop_formula(torch.ops.deit.direct_linear_act)(linear._linear_act_flops)
register_flop_formula(torch.ops.deit.direct_weight_grad)(linear._weight_grad_flops)
register_flop_formula(torch.ops.deit.direct_perceptron)(perceptron._flops)
