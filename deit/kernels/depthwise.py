r"""The depthwise convolution of a mirror pair, in one launch (arXiv:2502.05169, section 3).

The channels are four quarters (s1, s2, a1, a2), convolved with kernels (ss, sa, as, aa) of which
the first and the last are mirror-symmetric, k(-x) = k(x), and the others antisymmetric,
k(-x) = -k(x). The results are the quarters (s, a, s, a), so the middle ones are exchanged. Half of
a kernel decides the rest: `taps` below is the left half with the centre column, (k, k // 2 + 1, C).
Twin of `deit.layers.conv.MirrorDepthwiseConv2d`; maps have channels last here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deit.kernels import tuning
from deit.kernels.backends import triton_runs
from deit.kernels.tuning import Candidate

__all__ = ["exchange", "mirror_depthwise", "whole_kernel"]

_OPTIONS = dict(mutates_args=())


def mirror_depthwise(
    x: Tensor, kernel: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The equivariant depthwise convolution of stride 1 that keeps the size.

    Args:
        x: (B, H, W, C), C a multiple of 4.
        kernel: (C, 1, k, k), k odd, (anti)symmetric kernels one quarter after another; or only
            their left halves with the centre column, (C, 1, k, k // 2 + 1). Nothing else of them is
            read, and the gradient of the right halves is zero.
        bias: (C,), in the order of the kernels.
        dtype: of the result, if not that of `x`; rounding once here spares another pass.

    Returns:
        A new contiguous tensor of the shape of `x`.

    Raises:
        ValueError: if sizes do not fit or `x` is not floating.
    """
    channels, size = x.shape[-1], kernel.shape[-2]
    stored = size // 2 + 1
    if x.dim() != 4 or channels % 4 or not x.is_floating_point():
        raise ValueError(
            "x must be floating, (B, H, W, C) with C a multiple of 4, not "
            f"{tuple(x.shape)} of {x.dtype}"
        )
    fits = kernel.shape[:2] == (channels, 1) and kernel.shape[3] in (stored, size)
    if kernel.dim() != 4 or size % 2 == 0 or not fits:
        raise ValueError(
            f"kernel must be ({channels}, 1, k, k) with odd k, or (…, k // 2 + 1) for its left "
            f"half, not {tuple(kernel.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must have {channels} elements, not {tuple(bias.shape)}")
    # taps first: neighbouring threads, which have neighbouring channels, read a line of memory
    taps = kernel[:, 0, :, :stored].permute(1, 2, 0).contiguous()
    return torch.ops.deit.mirror_depthwise(x, taps, bias, dtype or x.dtype)


def exchange(x: Tensor) -> Tensor:
    """Exchange the second and the third quarter of the last axis; its own inverse."""
    first, second, third, fourth = x.chunk(4, -1)
    return torch.cat([first, third, second, fourth], -1)


def _signs(like: Tensor) -> Tensor:
    """+1 for the symmetric quarters, -1 for the antisymmetric ones, (C,)."""
    return like.new_tensor([1.0, -1.0, -1.0, 1.0]).repeat_interleave(like.shape[-1] // 4)


def whole_kernel(taps: Tensor) -> Tensor:
    """(k, k // 2 + 1, C) -> (C, 1, k, k)."""
    right = taps[:, :-1].flip(1) * _signs(taps)
    return torch.cat([taps, right], 1).permute(2, 0, 1)[:, None]


def _first(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), without a copy."""
    return x.permute(0, 3, 1, 2)


def plain_depthwise(x: Tensor, taps: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`mirror_depthwise` in torch operations, in the dtype of the result."""
    kernel = whole_kernel(taps).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    padding, groups = taps.shape[0] // 2, taps.shape[2]
    y = F.conv2d(_first(x.to(dtype)), kernel, bias, padding=padding, groups=groups)
    return exchange(y.permute(0, 2, 3, 1)).contiguous()


def plain_input_gradient(grad: Tensor, taps: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of x in torch operations, of dtype `dtype`, computed in that of `grad`."""
    kernel = whole_kernel(taps).to(grad.dtype)
    padding, groups = taps.shape[0] // 2, taps.shape[2]
    dx = F.conv_transpose2d(_first(exchange(grad)), kernel, padding=padding, groups=groups)
    return dx.permute(0, 2, 3, 1).to(dtype).contiguous()


def plain_taps_gradient(grad: Tensor, x: Tensor, size: int) -> Tensor:
    """The gradients of the taps, one after another, and of the bias, in torch operations.

    Returns:
        (k * (k // 2 + 1) + 1, C) in the dtype of `grad`, as torch's convolutions have it.
    """
    work = torch.promote_types(grad.dtype, torch.float32)
    channels, padding = x.shape[-1], size // 2
    g, x = _first(exchange(grad)), _first(x.to(grad.dtype))
    kernel = g.new_empty(channels, 1, size, size)
    _, whole, _ = torch.ops.aten.convolution_backward(
        g, x, kernel, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], channels,
        [False, True, False],
    )  # fmt: skip
    whole = whole[:, 0].permute(1, 2, 0).to(work)  # (k, k, C)
    left, centre = whole[:, :padding], whole[:, padding : padding + 1]
    left = left + whole[:, padding + 1 :].flip(1) * _signs(whole)
    shift = g.sum((0, 2, 3), dtype=work)
    return torch.cat([torch.cat([left, centre], 1).flatten(0, 1), shift[None]]).to(grad.dtype)


_PLAIN = Candidate("plain", plain_depthwise)
_PLAIN_INPUT = Candidate("plain", plain_input_gradient)
_PLAIN_TAPS = Candidate("plain", plain_taps_gradient)


def _input_gradient(grad: Tensor, taps: Tensor, dtype: torch.dtype, config: Any) -> Tensor:
    from deit.kernels import depthwise_triton as kernels

    return kernels.convolve(grad, taps, None, dtype, config, backward=True)


def _candidates(x: Tensor, size: int, plain: Candidate) -> list[Candidate]:
    """For the operation that `plain` computes, on maps like `x` and kernels of `size`."""
    if not triton_runs(x):
        return [plain]
    from deit.kernels import depthwise_triton as kernels

    if size != kernels.KERNEL_SIZE:
        return [plain]
    if plain is _PLAIN:
        run = kernels.convolve
    else:
        run = _input_gradient if plain is _PLAIN_INPUT else kernels.taps_gradient
    fused = [
        Candidate(f"triton {c.width}x{c.channels}x{c.warps}", functools.partial(run, config=c))
        for c in kernels.configs(x)
    ]
    return [*fused, plain]


def _key(x: Tensor, *others: Any) -> tuple:
    return (*x.shape[1:], tuning.bucket(x.shape[0]), *others)


def _channels_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("deit::mirror_depthwise", **_OPTIONS)
def _depthwise_op(x: Tensor, taps: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return tuning.run(
            "mirror_depthwise",
            _key(x, taps.shape[0], taps.dtype, dtype, bias is None),
            _PLAIN,
            lambda: _candidates(x, taps.shape[0], _PLAIN),
            _channels_contiguous(x),
            taps.contiguous(),
            None if bias is None else bias.contiguous(),
            dtype,
        )


@_depthwise_op.register_fake
def _(x: Tensor, taps: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.custom_op("deit::mirror_depthwise_input", **_OPTIONS)
def _input_op(grad: Tensor, taps: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(grad.device.type, enabled=False):
        return tuning.run(
            "mirror_depthwise_input",
            _key(grad, taps.shape[0], taps.dtype, dtype),
            _PLAIN_INPUT,
            lambda: _candidates(grad, taps.shape[0], _PLAIN_INPUT),
            _channels_contiguous(grad),
            taps.contiguous(),
            dtype,
        )


@_input_op.register_fake
def _(grad: Tensor, taps: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


@torch.library.custom_op("deit::mirror_depthwise_taps", **_OPTIONS)
def _taps_op(grad: Tensor, x: Tensor, size: int) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return tuning.run(
            "mirror_depthwise_taps",
            _key(x, size, x.dtype),  # which may differ from that of grad, the first argument
            _PLAIN_TAPS,
            lambda: _candidates(x, size, _PLAIN_TAPS),
            grad.contiguous(),
            _channels_contiguous(x),
            size,
        )


@_taps_op.register_fake
def _(grad: Tensor, x: Tensor, size: int) -> Tensor:
    return grad.new_empty((size * (size // 2 + 1) + 1, x.shape[-1]))


# The three operations are linear in each of their tensors, and each is what the derivatives of the
# others consist of, to any order.


def _setup(ctx, inputs, output) -> None:
    x, taps, bias, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, taps)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, taps = ctx.saved_tensors
    dx = _input_op(grad, taps, x.dtype) if ctx.needs_input_grad[0] else None
    if not any(ctx.needs_input_grad[1:]):
        return dx, None, None, None
    sums = _taps_op(grad, x, taps.shape[0])
    bias = None if ctx.bias_dtype is None else sums[-1].to(ctx.bias_dtype)
    return dx, sums[:-1].view(taps.shape).to(taps.dtype), bias, None


def _setup_input(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward_input(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    g, taps = ctx.saved_tensors
    sums = _taps_op(g, grad, taps.shape[0])
    return (
        _depthwise_op(grad, taps, None, g.dtype),
        sums[:-1].view(taps.shape).to(taps.dtype),
        None,
    )


def _setup_taps(ctx, inputs, output) -> None:
    *tensors, ctx.size = inputs
    ctx.save_for_backward(*tensors)


def _backward_taps(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    g, x = ctx.saved_tensors
    taps = grad[:-1].view(ctx.size, -1, grad.shape[1])
    return _depthwise_op(x, taps, grad[-1], g.dtype), _input_op(g, taps, x.dtype), None


_depthwise_op.register_autograd(_backward, setup_context=_setup)
_input_op.register_autograd(_backward_input, setup_context=_setup_input)
_taps_op.register_autograd(_backward_taps, setup_context=_setup_taps)


def _flops(maps: torch.Size, size: int) -> int:
    """Those of the convolution with whole kernels, whichever implementation runs."""
    images, height, width, channels = maps
    return 2 * images * height * width * channels * size * size


@register_flop_formula(torch.ops.deit.mirror_depthwise)
def _(x: torch.Size, taps: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _flops(x, taps[0])


@register_flop_formula(torch.ops.deit.mirror_depthwise_input)
def _(grad: torch.Size, taps: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _flops(grad, taps[0])


@register_flop_formula(torch.ops.deit.mirror_depthwise_taps)
def _(grad: torch.Size, x: torch.Size, size: int, *args: Any, **kwargs: Any) -> int:
    return _flops(x, size)
