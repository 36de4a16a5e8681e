r"""LayerNorm of a mirror pair in one pass over memory (arXiv:2502.05169, section 3).

Each half of [s | a] is centred over its own K channels; both are divided by
sigma = sqrt((var s + var a + eps) / 2), then scaled and shifted. With n = (x - mean) / sigma and
h = grad * weight, the gradient of x is (h - mean_half(h) - n * sum(h n) / 2K) / sigma, where
mean_half is over the channels of the same half and the sum over all of them.
Twin of `deit.layers.norm.LayerNorm` for the flopping group.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from deit.kernels import tuning
from deit.kernels.backends import triton_runs
from deit.kernels.gelu import as_rows
from deit.kernels.tuning import Candidate

__all__ = ["mirror_layer_norm", "plain_layer_norm"]

_OPTIONS = dict(mutates_args=())


def mirror_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    """The equivariant LayerNorm of a packed feature, with moments in float32 at least.

    Args:
        x: (..., 2K), symmetric channels first.
        weight: (2K,), the scale of both halves.
        bias: (2K,), the shift; an equivariant one is zero on the antisymmetric half.
        eps: added to the sum of the two variances.
        dtype: of the result, if not that of `x`; rounding once here spares another pass.

    Returns:
        A new contiguous tensor of the shape of `x`.

    Raises:
        ValueError: if the last axis is odd, a vector has another size or `x` is not floating.
    """
    size = x.shape[-1]
    if size % 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be floating, with an even last axis, not {tuple(x.shape)} of {x.dtype}"
        )
    if weight.shape != (size,) or bias.shape != (size,):
        raise ValueError(
            f"weight and bias must have {size} elements as the last axis of x, not "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    return torch.ops.deit.mirror_layer_norm(x, weight, bias, eps, dtype or x.dtype)[0]


def _work(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def plain_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`mirror_layer_norm` in torch operations: (rows, 2K) to the result and its moments.

    The moments are (3, rows): mean of s, mean of a, 1 / sigma.
    """
    work = _work(x.dtype)
    halves = x.to(work).unflatten(-1, (2, -1))
    means = halves.mean(-1)
    centred = (halves - means[..., None]).flatten(-2)
    # The parts' means are zero now, so the common variance is the mean of the parts' own.
    y, _, rstd = torch.native_layer_norm(
        centred, (x.shape[-1],), weight.to(work), bias.to(work), eps / 2
    )
    return y.to(dtype), torch.cat([means.t(), rstd.reshape(1, -1)])


def plain_layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, moments: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradient of `x`, and those of scale and shift together, (2, 2K) of the moments' dtype."""
    work = moments.dtype
    grad = grad.to(work)
    halves = x.to(work).unflatten(-1, (2, -1))
    normed = (halves - moments[:2].t()[..., None]) * moments[2][:, None, None]
    h = (grad * weight.to(work)).unflatten(-1, (2, -1))
    common = (h * normed).mean((-2, -1), keepdim=True)
    dx = (h - h.mean(-1, keepdim=True) - normed * common) * moments[2][:, None, None]
    sums = torch.stack([(grad * normed.flatten(-2)).sum(0), grad.sum(0)])
    return dx.flatten(-2).to(x.dtype), sums


_PLAIN = Candidate("plain", plain_layer_norm)
_PLAIN_BACKWARD = Candidate("plain", plain_layer_norm_backward)


def _candidates(x: Tensor, direction: str, plain: Candidate) -> list[Candidate]:
    if not triton_runs(x):
        return [plain]
    from deit.kernels import layer_norm_triton as kernels

    if x.shape[-1] // 2 > kernels.LARGEST_HALF:
        return [plain]
    run = getattr(kernels, direction)
    configs = kernels.FORWARD_CONFIGS if direction == "forward" else kernels.BACKWARD_CONFIGS
    fused = [
        Candidate(f"triton {c.elements}x{c.warps}", functools.partial(run, config=c))
        for c in configs
        if kernels.tile(x.shape[-1] // 2, c)[0]
    ]
    return [*fused, plain]


def _key(x: Tensor, *dtypes: torch.dtype) -> tuple:
    return (x.shape[-1], tuning.bucket(x.numel() // x.shape[-1]), *dtypes)


@torch.library.custom_op("deit::mirror_layer_norm", **_OPTIONS)
def _norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        y, moments = tuning.run(
            "mirror_layer_norm",
            _key(x, weight.dtype, dtype),
            _PLAIN,
            lambda: _candidates(x, "forward", _PLAIN),
            as_rows(x),
            weight.contiguous(),
            bias.contiguous(),
            eps,
            dtype,
        )
    return y.view(x.shape), moments


@_norm_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((3, rows), dtype=_work(x.dtype))


@torch.library.custom_op("deit::mirror_layer_norm_backward", **_OPTIONS)
def _norm_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, moments: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        dx, sums = tuning.run(
            "mirror_layer_norm_backward",
            _key(x, weight.dtype, x.dtype),
            _PLAIN_BACKWARD,
            lambda: _candidates(x, "backward", _PLAIN_BACKWARD),
            as_rows(grad).contiguous(),
            as_rows(x),
            weight.contiguous(),
            moments,
            eps,
        )
    return dx.view(x.shape), sums


@_norm_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, moments: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((2, x.shape[-1]), dtype=moments.dtype)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps, _ = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, moments = ctx.saved_tensors
    dx, sums = _norm_backward_op(grad, x, weight, moments, ctx.eps)
    return dx, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None, None


def _setup_double(ctx, inputs, output) -> None:
    *tensors, _, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of second order are rare: torch derives them from the plain formula.

    The moments are recomputed from x, so that what flows through them reaches x.
    """
    with torch.enable_grad():
        grad, x, weight = inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors[:3]]
        rows = x.reshape(-1, x.shape[-1]).to(_work(x.dtype))
        halves = rows.unflatten(-1, (2, -1))
        means = halves.mean(-1)
        variance = (halves - means[..., None]).square().mean((-2, -1)) + ctx.eps / 2
        moments = torch.cat([means.t(), variance.rsqrt()[None]])
        dx, sums = plain_layer_norm_backward(
            grad.reshape(rows.shape), rows, weight, moments, ctx.eps
        )
        results = (dx.view(x.shape).to(x.dtype), sums)
    return (*torch.autograd.grad(results, inputs, grads), None, None)


_norm_op.register_autograd(_backward, setup_context=_setup)
_norm_backward_op.register_autograd(_double_backward, setup_context=_setup_double)
