r"""Equivariant linear maps of packed features: both irreps in one operation.

y_s = W_s x_s + b, y_a = W_a x_a (arXiv:2502.05169, section 3), and, if asked for, the nonlinearity
of `deit.kernels.gelu` on the result. Twin of `deit.layers.linear.Linear` for the flopping group.

The two irreps are interleaved along the last axis in segments, [s segment | a segment | s segment
| ...]; one segment each is the packed layout. Attention wants the symmetric and antisymmetric
channels of a head side by side: with `out_segment` half a head's width, qkv writes them so, and
with `in_segment` the projection after attention reads them so, and nothing is copied in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deit.kernels import tuning
from deit.kernels.backends import compiles_directly, gelu_triton, linear_launch, triton_runs
from deit.kernels.gelu import _gelu_backward_op, as_rows, check_activation, gelu_rows
from deit.kernels.tuning import Candidate

__all__ = ["mirror_linear"]


def mirror_linear(
    x: Tensor,
    weight_sym: Tensor,
    weight_asym: Tensor,
    bias: Tensor | None = None,
    *,
    in_segment: int | None = None,
    out_segment: int | None = None,
    act: str | None = None,
) -> Tensor:
    """The block-diagonal linear map of a mirror pair, then optionally its nonlinearity.

    Args:
        x: (..., 2K).
        weight_sym, weight_asym: (N, K) each, with any strides.
        bias: (N,), added to the symmetric part; or None.
        in_segment: channels of one irrep that lie side by side in `x`, a divisor of K; K if None.
        out_segment: likewise in the result, a divisor of N.
        act: None, "gelu" or "quick_gelu".

    Returns:
        A new contiguous tensor (..., 2N). Under autocast everything is cast to the autocast
        dtype, as for `torch.addmm`.

    Raises:
        ValueError: if shapes, dtypes or segments do not fit or `act` is unknown.
    """
    direct = compiles_directly(x)
    x, (weight_sym, weight_asym), (bias,) = cast(x, (weight_sym, weight_asym), (bias,), direct)
    check_parameters(x.shape[-1], x.dtype, weight_sym, weight_asym, bias, direct)
    out_features, in_features = weight_sym.shape
    in_segment = in_features if in_segment is None else in_segment
    out_segment = out_features if out_segment is None else out_segment
    if min(in_segment, out_segment) < 1 or in_features % in_segment or out_features % out_segment:
        raise ValueError(
            f"in_segment {in_segment} must divide {in_features} and out_segment {out_segment} "
            f"divide {out_features}"
        )
    ops = torch.ops.deit
    if act is None:
        linear = ops.direct_linear if direct else ops.mirror_linear
        return linear(x, weight_sym, weight_asym, bias, in_segment, out_segment)
    check_activation(act)
    if out_segment != out_features:
        raise ValueError("act needs a packed result: out_segment must be None")
    inputs = (x, weight_sym, weight_asym) + (() if bias is None else (bias,))
    save = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    linear = ops.direct_linear_act if direct else ops.mirror_linear_act
    return linear(x, weight_sym, weight_asym, bias, in_segment, act, save)[0]


def cast(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    any_bias: bool,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor | None]]:
    """What autocast makes of the factors of products, and of biases except with `any_bias`:
    kernels that are launched directly add a bias of any dtype, and casts are launches."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weights, biases
    dtype = torch.get_autocast_dtype(device)
    if not any_bias:
        biases = [None if b is None else b.to(dtype) for b in biases]
    return x.to(dtype), [w.to(dtype) for w in weights], biases


def check_parameters(
    width: int, dtype: torch.dtype, ws: Tensor, wa: Tensor, bias: Tensor | None, any_bias: bool
) -> None:
    """Raise ValueError unless these map features of this width and dtype; with `any_bias` under
    autocast that may have another dtype."""
    n, k = ws.shape
    if wa.shape != ws.shape or width != 2 * k or (bias is not None and bias.shape != (n,)):
        raise ValueError(
            f"features of width {width}, weights of shapes {tuple(ws.shape)} and "
            f"{tuple(wa.shape)} and a bias of {None if bias is None else tuple(bias.shape)} "
            "do not fit: 2K, (N, K), (N, K) and (N,) do"
        )
    any_bias = any_bias and torch.is_autocast_enabled(ws.device.type)
    dtypes = {dtype} | {t.dtype for t in (ws, wa, None if any_bias else bias) if t is not None}
    if len(dtypes) > 1 or not dtype.is_floating_point:
        raise ValueError(f"one floating dtype is needed, not {sorted(map(str, dtypes))}")


# --- layouts and plain implementations, on x of shape (rows, 2K) -------------------------------
# Products and sums are told their dtype, by `out` or as an argument: backward may run under
# autocast, which would change it.


def _part(x: Tensor, irrep: int, segment: int) -> Tensor:
    """The channels of one irrep: (rows, 2K) -> (rows, K), a view if `x` is packed."""
    return x.unflatten(1, (-1, 2, segment))[:, :, irrep].flatten(1)


def _result(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 2 * weight.shape[0])


def _packed(weight: Tensor, in_segment: int, out_segment: int) -> bool:
    return (weight.shape[1], weight.shape[0]) == (in_segment, out_segment)


def _plain_linear(
    x: Tensor, ws: Tensor, wa: Tensor, bias: Tensor | None, in_segment: int, out_segment: int
) -> Tensor:
    n = ws.shape[0]
    y = _result(x, ws)
    # A packed result is written in place, as the two halves of its rows; others are copied.
    packed = out_segment == n
    halves = y.split(n, 1) if packed else [y.new_empty(len(y), n) for _ in range(2)]
    for irrep, (half, weight) in enumerate(zip(halves, (ws, wa), strict=True)):
        part = _part(x, irrep, in_segment)
        if irrep == 0 and bias is not None:
            torch.addmm(bias, part, weight.t(), out=half)
        else:
            torch.mm(part, weight.t(), out=half)
    if not packed:
        for irrep, half in enumerate(halves):
            y.unflatten(1, (-1, 2, out_segment))[:, :, irrep] = half.unflatten(1, (-1, out_segment))
    return y


def _batched_linear(
    x: Tensor, ws: Tensor, wa: Tensor, bias: Tensor | None, in_segment: int, out_segment: int
) -> Tensor:
    """One strided batched product, for the packed layout only."""
    y = _result(x, ws)
    pairs = (t.unflatten(1, (2, -1)).transpose(0, 1) for t in (x, y))
    torch.bmm(next(pairs), torch.stack([ws, wa]).transpose(1, 2), out=next(pairs))
    if bias is not None:
        y[:, : len(bias)] += bias
    return y


def _plain_weight_grad(
    grad: Tensor, x: Tensor, in_segment: int, out_segment: int, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    parts = [_part(grad, irrep, out_segment) for irrep in range(2)]
    weights = [grad.new_empty(grad.shape[1] // 2, x.shape[1] // 2) for _ in range(2)]
    for irrep, (weight, part) in enumerate(zip(weights, parts, strict=True)):
        torch.mm(part.t(), _part(x, irrep, in_segment), out=weight)
    return (*weights, _bias_grad(parts[0], with_bias))


def _bias_grad(part: Tensor, with_bias: bool) -> Tensor:
    return part.sum(0, dtype=part.dtype) if with_bias else part.new_empty(0)


def _batched_weight_grad(
    grad: Tensor, x: Tensor, in_segment: int, out_segment: int, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One strided batched product, for the packed layout only."""
    grads, parts = (t.unflatten(1, (2, -1)).transpose(0, 1) for t in (grad, x))
    weights = grad.new_empty(2, grads.shape[2], parts.shape[2])
    torch.bmm(grads.transpose(1, 2), parts, out=weights)
    # Outputs of an operation must not share memory.
    return (*(w.clone() for w in weights), _bias_grad(grads[0], with_bias))


def _then_act(linear, gelu):
    """A linear candidate followed by one of the nonlinearity: -> (result, what backward needs)."""

    def run(x, ws, wa, bias, in_segment, act, save):
        h = linear(x, ws, wa, bias, in_segment, ws.shape[0])
        return gelu(h, act), h if save else h.new_empty(0)

    return run


_PLAIN = Candidate("plain", _plain_linear)
_BATCHED = Candidate("batched", _batched_linear)
_PLAIN_ACT = Candidate("plain", _then_act(_plain_linear, gelu_rows))
_PLAIN_WEIGHT_GRAD = Candidate("plain", _plain_weight_grad)
_BATCHED_WEIGHT_GRAD = Candidate("batched", _batched_weight_grad)


def _key(x: Tensor, n: int, *rest: object) -> tuple:
    tf32 = x.dtype == torch.float32 and x.is_cuda and tuning.tf32_allowed()
    return (n, x.shape[1], tuning.bucket(x.shape[0]), tf32, *rest)


def _linear_candidates(x: Tensor, packed: bool) -> list[Candidate]:
    kernels = linear_launch().linear_candidates(x.dtype) if triton_runs(x) else []
    # Without timing: cuBLAS if it needs no copies.
    return [_PLAIN, _BATCHED, *kernels] if packed and x.is_cuda else [*kernels, _PLAIN]


def _act_candidates(dtype: torch.dtype, packed: bool) -> list[Candidate]:
    gelu = gelu_triton().gelu
    library = [Candidate("plain_then_gelu", _then_act(_plain_linear, gelu))]
    if packed:
        library.append(Candidate("batched_then_gelu", _then_act(_batched_linear, gelu)))
    return [*library, *linear_launch().act_candidates(dtype), _PLAIN_ACT]


def _weight_grad_candidates(x: Tensor, packed: bool) -> list[Candidate]:
    kernels = linear_launch().weight_grad_candidates(x.dtype) if triton_runs(x) else []
    if packed and x.is_cuda:
        return [_PLAIN_WEIGHT_GRAD, _BATCHED_WEIGHT_GRAD, *kernels]
    return [*kernels, _PLAIN_WEIGHT_GRAD]


# --- operations -------------------------------------------------------------------------------


@torch.library.custom_op("deit::mirror_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    weight_sym: Tensor,
    weight_asym: Tensor,
    bias: Tensor | None,
    in_segment: int,
    out_segment: int,
) -> Tensor:
    rows, n = as_rows(x), weight_sym.shape[0]
    packed = _packed(weight_sym, in_segment, out_segment)
    layout = weight_sym.stride(1) == 1, weight_asym.stride(1) == 1
    y = tuning.run(
        "mirror_linear",
        _key(rows, n, in_segment, out_segment, bias is not None, layout),
        _PLAIN,
        lambda: _linear_candidates(x, packed),
        rows,
        weight_sym,
        weight_asym,
        bias,
        in_segment,
        out_segment,
    )
    return y.view(*x.shape[:-1], 2 * n)


@_linear_op.register_fake
def _(x, weight_sym, weight_asym, bias, in_segment, out_segment):
    return x.new_empty(*x.shape[:-1], 2 * weight_sym.shape[0])


@torch.library.custom_op("deit::mirror_linear_act", mutates_args=())
def _linear_act_op(
    x: Tensor,
    weight_sym: Tensor,
    weight_asym: Tensor,
    bias: Tensor | None,
    in_segment: int,
    act: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """-> the result and, if `save`, the linear map's result, which backward needs; else empty."""
    rows, n = as_rows(x), weight_sym.shape[0]
    packed = _packed(weight_sym, in_segment, n)
    layout = weight_sym.stride(1) == 1, weight_asym.stride(1) == 1
    y, h = tuning.run(
        "mirror_linear_act",
        _key(rows, n, in_segment, act, save, bias is not None, layout),
        _PLAIN_ACT,
        lambda: _act_candidates(x.dtype, packed) if triton_runs(x) else [_PLAIN_ACT],
        rows,
        weight_sym,
        weight_asym,
        bias,
        in_segment,
        act,
        save,
    )
    shape = (*x.shape[:-1], 2 * n)
    return y.view(shape), h.view(shape) if save else h


@_linear_act_op.register_fake
def _(x, weight_sym, weight_asym, bias, in_segment, act, save):
    y = x.new_empty(*x.shape[:-1], 2 * weight_sym.shape[0])
    return y, torch.empty_like(y) if save else x.new_empty(0)


@torch.library.custom_op("deit::mirror_linear_weight_grad", mutates_args=())
def _weight_grad_op(
    grad: Tensor, x: Tensor, in_segment: int, out_segment: int, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of both weights (N, K) and of the bias (N,), empty without `with_bias`."""
    grad, x = as_rows(grad), as_rows(x)
    packed = grad.shape[1] == 2 * out_segment and x.shape[1] == 2 * in_segment
    return tuning.run(
        "mirror_linear_weight_grad",
        _key(x, grad.shape[1] // 2, in_segment, out_segment, with_bias),
        _PLAIN_WEIGHT_GRAD,
        lambda: _weight_grad_candidates(x, packed),
        grad,
        x,
        in_segment,
        out_segment,
        with_bias,
    )


@_weight_grad_op.register_fake
def _(grad, x, in_segment, out_segment, with_bias):
    n, k = grad.shape[-1] // 2, x.shape[-1] // 2
    weights = [grad.new_empty(n, k) for _ in range(2)]
    return (*weights, grad.new_empty(n if with_bias else 0))


# --- gradients --------------------------------------------------------------------------------


def gradients(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    segments: tuple[int, int],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Of x, both weights and the bias, as `needed` says, from that of the linear map's result."""
    (sym, asym), (in_segment, out_segment) = weights, segments
    dx = d_sym = d_asym = d_bias = None
    if needed[0]:
        dx = _linear_op(grad, sym.t(), asym.t(), None, out_segment, in_segment)
    if any(needed[1:]):
        d_sym, d_asym, d_bias = _weight_grad_op(grad, x, in_segment, out_segment, needed[3])
    return dx, d_sym, d_asym, d_bias if needed[3] else None


def _setup(ctx, inputs, output) -> None:
    ctx.segments = inputs[4:]
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx, grad: Tensor) -> tuple:
    x, *weights = ctx.saved_tensors
    return (*gradients(grad, x, weights, ctx.segments, ctx.needs_input_grad[:4]), None, None)


def _act_setup(ctx, inputs, output) -> None:
    ctx.in_segment, ctx.act, save = inputs[4:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *(output[1:] if save else ()))


def _act_backward(ctx, grad: Tensor | None, grad_saved: Tensor | None) -> tuple:
    # `grad_saved` is there for gradients of second order only.
    x, *weights, h = ctx.saved_tensors  # once: under checkpointing they cannot be asked for again
    total = grad_saved
    if grad is not None:
        first = _gelu_backward_op(grad, h, ctx.act)
        total = first if total is None else total + first
    if total is None:
        return (None,) * 7
    segments, needed = (ctx.in_segment, h.shape[-1] // 2), ctx.needs_input_grad[:4]
    return (*gradients(total, x, weights, segments, needed), None, None, None)


def _weight_grad_setup(ctx, inputs, output) -> None:
    ctx.in_segment, ctx.out_segment, ctx.with_bias = inputs[2:]
    ctx.save_for_backward(*inputs[:2])


def _weight_grad_backward(ctx, gs: Tensor, ga: Tensor, gb: Tensor) -> tuple:
    """The weights' gradients are bilinear in `grad` and `x`: both gradients are linear maps."""
    grad, x = ctx.saved_tensors
    bias = gb if ctx.with_bias else None
    d_grad = _linear_op(x, gs, ga, bias, ctx.in_segment, ctx.out_segment)
    d_x = _linear_op(grad, gs.t(), ga.t(), None, ctx.out_segment, ctx.in_segment)
    return d_grad, d_x, None, None, None


_linear_op.register_autograd(_backward, setup_context=_setup)
_linear_act_op.register_autograd(_act_backward, setup_context=_act_setup)
_weight_grad_op.register_autograd(_weight_grad_backward, setup_context=_weight_grad_setup)


@register_flop_formula(torch.ops.deit.mirror_linear)
def _linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    rows = _numel(x_shape[:-1])
    return 2 * 2 * rows * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.deit.mirror_linear_act)
def _linear_act_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return _linear_flops(x_shape, weight_shape)


@register_flop_formula(torch.ops.deit.mirror_linear_weight_grad)
def _weight_grad_flops(grad_shape, x_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _numel(grad_shape) * (x_shape[-1] // 2)


def _numel(shape) -> int:
    return torch.Size(shape).numel()
