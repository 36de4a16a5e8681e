"""Triton kernels of the equivariant 7x7 depthwise convolution; `depthwise` says what they compute.

Arithmetic. A mirrored kernel has k(-x) = sign * k(x), so a row of seven taps is
k0 x[w] + sum over d of k_d (x[w - d] + sign x[w + d]): the three folded values are shared by the
seven output rows that an input row takes part in. For one input value that is 3 additions and
28 multiply-adds in place of 49.

Bytes. With 14 x 14 maps the multiply-adds at the full float32 rate take about as long as reading
and writing device memory once, so instructions are what to save: a thread owns a position and a few
neighbouring channels, walks down the rows of the map, and keeps the 28 taps of each of its
channels and the six unfinished output rows in registers. An output row is finished by the input row
three below it, and the register moves that this sliding takes cost nothing, because every
multiply-add writes to the next row's register anyway. An input row is read seven times (once a
shift), all but once from the L1 cache; lanes lie along channels, so every load is a full line. The
next row is requested before the current one is used, which hides the way to memory.

A program has the channels of one quarter, so its sign and the exchange of the middle quarters are
numbers of the whole program: the exchange is an address.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.layer_norm_triton import processors

__all__ = ["Config", "configs", "convolve", "taps_gradient"]

KERNEL_SIZE = 7
# Programs of the taps' gradient on one multiprocessor, as far as there are images for them.
PROGRAMS = 4


class Config(NamedTuple):
    """`width` x `channels` is the tile of a program, `warps` groups of 32 threads share it.

    Their quotient is the number of neighbouring channels of a thread, 1, 2 or 4. A thread must not
    own more than one position: it would hold the taps once for each of them.
    """

    width: int
    channels: int
    warps: int


# Two channels a thread take 101 to 128 registers, four 206 to 241 (compiled for sm_80 and sm_90).
# Few of them, because each has to be compiled before it can be compared.
WIDE = (Config(16, 64, 16), Config(16, 32, 8), Config(8, 64, 8), Config(16, 64, 8))
NARROW = (Config(8, 64, 8), Config(8, 32, 4))


def configs(x: Tensor) -> tuple[Config, ...]:
    """The configurations for maps (B, H, W, C): tiles not twice as wide as the map."""
    return NARROW if x.shape[2] <= NARROW[0].width else WIDE


@triton.jit
def _row_of_taps(taps_ptr, row, stride, place, mask):
    """k3, k2, k1, k0 of a row of the stored half, at each place of the tile."""
    taps_ptr += row * 4 * stride
    k3 = tl.load(taps_ptr + place, mask=mask, other=0.0).to(tl.float32)
    k2 = tl.load(taps_ptr + stride + place, mask=mask, other=0.0).to(tl.float32)
    k1 = tl.load(taps_ptr + 2 * stride + place, mask=mask, other=0.0).to(tl.float32)
    k0 = tl.load(taps_ptr + 3 * stride + place, mask=mask, other=0.0).to(tl.float32)
    return k3, k2, k1, k0


@triton.jit
def _shifted(x_ptr, w, width, mask, shift, step):
    """x at `shift` positions to the right, zero outside of the map."""
    inside = (w + shift >= 0) & (w + shift < width)
    return tl.load(x_ptr + shift * step, mask=mask & inside, other=0.0)


@triton.jit
def _row(x_ptr, w, width, mask, step, SIDE: tl.constexpr):
    """A row of the map at all seven shifts, as stored; SIDE -1 looks at it in a mirror."""
    l3 = _shifted(x_ptr, w, width, mask, -3 * SIDE, step)
    l2 = _shifted(x_ptr, w, width, mask, -2 * SIDE, step)
    l1 = _shifted(x_ptr, w, width, mask, -1 * SIDE, step)
    c = _shifted(x_ptr, w, width, mask, 0, step)
    r1 = _shifted(x_ptr, w, width, mask, 1 * SIDE, step)
    r2 = _shifted(x_ptr, w, width, mask, 2 * SIDE, step)
    r3 = _shifted(x_ptr, w, width, mask, 3 * SIDE, step)
    return l3, l2, l1, c, r1, r2, r3


@triton.jit
def _fold(left, right, sign):
    return tl.fma(right.to(tl.float32), sign, left.to(tl.float32))


@triton.jit
def _add_row(y, f3, f2, f1, f0, k3, k2, k1, k0):
    """One row of taps; written out, because the order decides the number of registers."""
    return tl.fma(f3, k3, tl.fma(f2, k2, tl.fma(f1, k1, tl.fma(f0, k0, y))))


@triton.jit
def _quarters(index, blocks):
    """The quarter of the kernels that program `index` has, and the one it is exchanged with."""
    quarter = index // blocks
    other = tl.where(quarter == 1, 2, tl.where(quarter == 2, 1, quarter))
    return quarter, other, tl.where(quarter == other, 1.0, -1.0)


@triton.jit
def convolve_kernel(
    x_ptr,
    taps_ptr,  # (7, 4, C)
    bias_ptr,  # (C,)
    y_ptr,
    height,
    width,
    image_stride,  # of x, whose channels are contiguous; y is contiguous
    row_stride,
    C: tl.constexpr,
    STEP: tl.constexpr,  # from one position of x to the next in a row
    HAS_BIAS: tl.constexpr,
    BACKWARD: tl.constexpr,  # the transposed convolution: y is the gradient of x's x
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    QUARTER: tl.constexpr = C // 4
    blocks = tl.cdiv(QUARTER, CHANNELS)
    quarter, other, sign = _quarters(tl.program_id(0) % (4 * blocks), blocks)
    # Neighbouring programs have the channels of the same lines of memory, then the next columns.
    across = tl.cdiv(width, WIDTH)
    index = tl.program_id(0) // (4 * blocks)
    image = (index // across).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    w = ((index % across) * WIDTH + tl.arange(0, WIDTH))[:, None]
    mask = (w < width) & (channel < QUARTER)[None, :]
    # Full tiles, though a row would do: each thread then loads its own taps where it uses them.
    everywhere = (channel < QUARTER)[None, :] & (w >= 0)
    place = quarter * QUARTER + channel[None, :] + 0 * w
    if BACKWARD:
        source, target = other, quarter
    else:
        source, target = quarter, other

    LAST: tl.constexpr = 6 if BACKWARD else 0
    FLIP: tl.constexpr = -1 if BACKWARD else 1
    a3, a2, a1, a0 = _row_of_taps(taps_ptr, LAST, C, place, everywhere)
    b3, b2, b1, b0 = _row_of_taps(taps_ptr, LAST + FLIP, C, place, everywhere)
    c3, c2, c1, c0 = _row_of_taps(taps_ptr, LAST + 2 * FLIP, C, place, everywhere)
    d3, d2, d1, d0 = _row_of_taps(taps_ptr, LAST + 3 * FLIP, C, place, everywhere)
    e3, e2, e1, e0 = _row_of_taps(taps_ptr, LAST + 4 * FLIP, C, place, everywhere)
    g3, g2, g1, g0 = _row_of_taps(taps_ptr, LAST + 5 * FLIP, C, place, everywhere)
    h3, h2, h1, h0 = _row_of_taps(taps_ptr, LAST + 6 * FLIP, C, place, everywhere)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + place, mask=everywhere, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros((WIDTH, CHANNELS), dtype=tl.float32)

    row_of_y = width * C
    x_ptr += image * image_stride + source * QUARTER + channel[None, :] + w * STEP
    # of the row above the map by three, which the first input row would finish
    y_ptr += (image * height - 3) * row_of_y + target * QUARTER + channel[None, :] + w * C
    y0, y1, y2, y3, y4, y5 = bias, bias, bias, bias, bias, bias
    none = 0 * w  # added to a number, it spreads it over a tile, which Triton's interpreter needs
    l3, l2, l1, c, r1, r2, r3 = _row(x_ptr, w, width, mask, STEP, FLIP)
    for h in range(height):
        f3, f2, f1 = _fold(l3, r3, sign), _fold(l2, r2, sign), _fold(l1, r1, sign)
        f0 = c.to(tl.float32)
        # after the last row the same once more, unused: an address that is always valid
        x_ptr += tl.where(h + 1 < height, row_stride, 0)
        l3, l2, l1, c, r1, r2, r3 = _row(x_ptr, w, width, mask, STEP, FLIP)
        y = _add_row(y0, f3, f2, f1, f0, h3, h2, h1, h0)
        tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=mask & (h + none >= 3))
        y0 = _add_row(y1, f3, f2, f1, f0, g3, g2, g1, g0)
        y1 = _add_row(y2, f3, f2, f1, f0, e3, e2, e1, e0)
        y2 = _add_row(y3, f3, f2, f1, f0, d3, d2, d1, d0)
        y3 = _add_row(y4, f3, f2, f1, f0, c3, c2, c1, c0)
        y4 = _add_row(y5, f3, f2, f1, f0, b3, b2, b1, b0)
        y5 = _add_row(bias, f3, f2, f1, f0, a3, a2, a1, a0)
        y_ptr += row_of_y
    # below the map there is nothing to add to the last three rows
    rows = height + none
    tl.store(y_ptr, y0.to(y_ptr.dtype.element_ty), mask=mask & (rows >= 3))
    tl.store(y_ptr + row_of_y, y1.to(y_ptr.dtype.element_ty), mask=mask & (rows >= 2))
    tl.store(y_ptr + 2 * row_of_y, y2.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_taps(k3, k2, k1, k0, f3, f2, f1, f0, u):
    return tl.fma(f3, u, k3), tl.fma(f2, u, k2), tl.fma(f1, u, k1), tl.fma(f0, u, k0)


@triton.jit
def _store_taps(partial_ptr, row, stride, mask, k3, k2, k1, k0):
    partial_ptr += row * 4 * stride
    tl.store(partial_ptr, tl.sum(k3, axis=0), mask=mask)
    tl.store(partial_ptr + stride, tl.sum(k2, axis=0), mask=mask)
    tl.store(partial_ptr + 2 * stride, tl.sum(k1, axis=0), mask=mask)
    tl.store(partial_ptr + 3 * stride, tl.sum(k0, axis=0), mask=mask)


@triton.jit
def taps_gradient_kernel(
    grad_ptr,
    x_ptr,
    partial_ptr,  # (programs along axis 1, 29, C): the taps', then the bias's
    images,
    images_per_program,
    height,
    width,
    image_stride,  # of x, whose channels are contiguous; grad is contiguous
    row_stride,
    C: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    QUARTER: tl.constexpr = C // 4
    blocks = tl.cdiv(QUARTER, CHANNELS)
    quarter, other, sign = _quarters(tl.program_id(0), blocks)
    channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    row_of_grad = width * C
    first = tl.program_id(1).to(tl.int64) * images_per_program
    last = tl.minimum(first + images_per_program, images)

    zero = tl.zeros((WIDTH, CHANNELS), dtype=tl.float32)
    shift = zero
    a3, a2, a1, a0 = zero, zero, zero, zero
    b3, b2, b1, b0 = zero, zero, zero, zero
    c3, c2, c1, c0 = zero, zero, zero, zero
    d3, d2, d1, d0 = zero, zero, zero, zero
    e3, e2, e1, e0 = zero, zero, zero, zero
    g3, g2, g1, g0 = zero, zero, zero, zero
    h3, h2, h1, h0 = zero, zero, zero, zero
    for image in range(first, last):
        for left in range(0, width, WIDTH):
            w = left + tl.arange(0, WIDTH)[:, None]
            mask = (w < width) & (channel < QUARTER)[None, :]
            rows = height + 0 * w  # as `none` above
            source = x_ptr + image * image_stride + quarter * QUARTER + channel[None, :] + w * STEP
            target = grad_ptr + image * height * row_of_grad + other * QUARTER
            target += channel[None, :] + w * C
            # u_i is the row of the gradient that is 3 - i below the row of x
            u6, u5, u4 = zero, zero, zero
            u3 = tl.load(target, mask=mask, other=0.0).to(tl.float32)
            target += row_of_grad
            u2 = tl.load(target, mask=mask & (rows > 1), other=0.0).to(tl.float32)
            target += row_of_grad
            u1 = tl.load(target, mask=mask & (rows > 2), other=0.0).to(tl.float32)
            shift += u3 + u2 + u1
            target += row_of_grad
            below = tl.load(target, mask=mask & (rows > 3), other=0.0)
            l3, l2, l1, c, r1, r2, r3 = _row(source, w, width, mask, STEP, 1)
            for h in range(height):
                u0 = below.to(tl.float32)
                f3, f2, f1 = _fold(l3, r3, sign), _fold(l2, r2, sign), _fold(l1, r1, sign)
                f0 = c.to(tl.float32)
                target += row_of_grad
                below = tl.load(target, mask=mask & (rows > h + 4), other=0.0)
                source += tl.where(h + 1 < height, row_stride, 0)
                l3, l2, l1, c, r1, r2, r3 = _row(source, w, width, mask, STEP, 1)
                shift += u0
                a3, a2, a1, a0 = _add_taps(a3, a2, a1, a0, f3, f2, f1, f0, u0)
                b3, b2, b1, b0 = _add_taps(b3, b2, b1, b0, f3, f2, f1, f0, u1)
                c3, c2, c1, c0 = _add_taps(c3, c2, c1, c0, f3, f2, f1, f0, u2)
                d3, d2, d1, d0 = _add_taps(d3, d2, d1, d0, f3, f2, f1, f0, u3)
                e3, e2, e1, e0 = _add_taps(e3, e2, e1, e0, f3, f2, f1, f0, u4)
                g3, g2, g1, g0 = _add_taps(g3, g2, g1, g0, f3, f2, f1, f0, u5)
                h3, h2, h1, h0 = _add_taps(h3, h2, h1, h0, f3, f2, f1, f0, u6)
                u6, u5, u4, u3, u2, u1 = u5, u4, u3, u2, u1, u0
    inside = channel < QUARTER
    partial_ptr += tl.program_id(1) * 29 * C + quarter * QUARTER + channel
    _store_taps(partial_ptr, 0, C, inside, a3, a2, a1, a0)
    _store_taps(partial_ptr, 1, C, inside, b3, b2, b1, b0)
    _store_taps(partial_ptr, 2, C, inside, c3, c2, c1, c0)
    _store_taps(partial_ptr, 3, C, inside, d3, d2, d1, d0)
    _store_taps(partial_ptr, 4, C, inside, e3, e2, e1, e0)
    _store_taps(partial_ptr, 5, C, inside, g3, g2, g1, g0)
    _store_taps(partial_ptr, 6, C, inside, h3, h2, h1, h0)
    tl.store(partial_ptr + 28 * C, tl.sum(shift, axis=0), mask=inside)


def convolve(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: Config,
    backward: bool = False,
) -> Tensor:
    """The convolution and the exchange of the quarters, or the transpose of both.

    Args:
        x: (B, H, W, C) with contiguous channels.
        taps: (7, 4, C), contiguous.
        bias: (C,), contiguous; None with `backward`.
        dtype: of the result.
    """
    images, height, width, channels = x.shape
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    blocks = triton.cdiv(channels // 4, config.channels)
    convolve_kernel[(images * triton.cdiv(width, config.width) * 4 * blocks,)](
        x,
        taps,
        taps if bias is None else bias,  # a pointer that is not used
        y,
        height,
        width,
        x.stride(0),
        x.stride(1),
        C=channels,
        STEP=x.stride(2),
        HAS_BIAS=bias is not None,
        BACKWARD=backward,
        WIDTH=config.width,
        CHANNELS=config.channels,
        num_warps=config.warps,
    )
    return y


def taps_gradient(grad: Tensor, x: Tensor, size: int, config: Config) -> Tensor:
    """The gradients of the taps and, in the last row, of the bias: (29, C), summed in float32.

    Args:
        grad: (B, H, W, C), contiguous.
        x: the same size, with contiguous channels.
        size: of the kernel, 7.
    """
    assert size == KERNEL_SIZE, size
    images, height, width, channels = x.shape
    tiles = 4 * triton.cdiv(channels // 4, config.channels)
    wanted = triton.cdiv(PROGRAMS * processors(x.device), tiles)
    images_per_program = max(1, triton.cdiv(images, wanted))
    programs = triton.cdiv(images, images_per_program)
    partial = torch.empty(programs, 29, channels, dtype=torch.float32, device=x.device)
    taps_gradient_kernel[(tiles, programs)](
        grad,
        x,
        partial,
        images,
        images_per_program,
        height,
        width,
        x.stride(0),
        x.stride(1),
        C=channels,
        STEP=x.stride(2),
        WIDTH=config.width,
        CHANNELS=config.channels,
        num_warps=config.warps,
    )
    return partial.sum(0).to(grad.dtype)
