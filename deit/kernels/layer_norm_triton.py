"""Triton kernels of the LayerNorm of packed features; `layer_norm` says what they compute.

A row is read once, as its two halves side by side in registers, so the moments, the centring and
the scaling cost no traffic beyond one read and one write. The backward pass visits rows in a fixed
order too: each program sums the gradients of scale and shift over its own rows in registers and
writes one row of partial sums, which a second launch adds up. Without atomics, so that the same
input gives the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "BACKWARD_CONFIGS",
    "FORWARD_CONFIGS",
    "LARGEST_HALF",
    "Config",
    "backward",
    "forward",
    "processors",
    "tile",
]

# Wider rows would not stay in registers.
LARGEST_HALF = 1024
# Programs of the backward pass on one multiprocessor: enough loads in flight, few partial sums.
PROGRAMS = 4


class Config(NamedTuple):
    """`elements`: of one half that a program holds, whole rows; `warps`: of 32 threads each."""

    elements: int
    warps: int


FORWARD_CONFIGS = (Config(2048, 4), Config(1024, 4), Config(4096, 8), Config(1024, 2))
# the backward pass holds twice as much: with more elements a thread it would spill
BACKWARD_CONFIGS = (Config(1024, 4), Config(2048, 8), Config(512, 2))


@triton.jit
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    moments_ptr,  # (3, rows): mean of s, mean of a, 1 / sigma
    rows,
    stride,  # of the rows of x; those of y are contiguous
    eps,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < HALF)[None, :]
    source = row[:, None] * stride + col[None, :]
    s = tl.load(x_ptr + source, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(x_ptr + source + HALF, mask=mask, other=0.0).to(tl.float32)
    mean_s = tl.sum(s, axis=1) / HALF
    mean_a = tl.sum(a, axis=1) / HALF
    s = tl.where(mask, s - mean_s[:, None], 0.0)
    a = tl.where(mask, a - mean_a[:, None], 0.0)
    # two passes over registers: the sum of squares less the square of the sum would cancel
    variance = (tl.sum(s * s, axis=1) + tl.sum(a * a, axis=1)) / HALF
    rstd = 1.0 / tl.sqrt(0.5 * (variance + eps))
    tl.store(moments_ptr + row, mean_s, mask=row < rows)
    tl.store(moments_ptr + rows + row, mean_a, mask=row < rows)
    tl.store(moments_ptr + 2 * rows + row, rstd, mask=row < rows)
    weight_s = tl.load(weight_ptr + col, mask=col < HALF, other=0.0).to(tl.float32)
    weight_a = tl.load(weight_ptr + HALF + col, mask=col < HALF, other=0.0).to(tl.float32)
    bias_s = tl.load(bias_ptr + col, mask=col < HALF, other=0.0).to(tl.float32)
    bias_a = tl.load(bias_ptr + HALF + col, mask=col < HALF, other=0.0).to(tl.float32)
    s = s * rstd[:, None] * weight_s[None, :] + bias_s[None, :]
    a = a * rstd[:, None] * weight_a[None, :] + bias_a[None, :]
    target = row[:, None] * (2 * HALF) + col[None, :]
    tl.store(y_ptr + target, s.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + target + HALF, a.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    moments_ptr,
    dx_ptr,
    partial_ptr,  # (programs, 2, 2 * HALF): sums for scale and shift
    rows,
    stride,  # of the rows of x; those of grad and dx are contiguous
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * ROWS
    col = tl.arange(0, BLOCK)
    weight_s = tl.load(weight_ptr + col, mask=col < HALF, other=0.0).to(tl.float32)
    weight_a = tl.load(weight_ptr + HALF + col, mask=col < HALF, other=0.0).to(tl.float32)
    scale_s = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    scale_a = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    shift_s = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    shift_a = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(program * ROWS, rows, step):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (col < HALF)[None, :]
        source = row[:, None] * stride + col[None, :]
        target = row[:, None] * (2 * HALF) + col[None, :]
        grad_s = tl.load(grad_ptr + target, mask=mask, other=0.0).to(tl.float32)
        grad_a = tl.load(grad_ptr + target + HALF, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(x_ptr + source, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(x_ptr + source + HALF, mask=mask, other=0.0).to(tl.float32)
        mean_s = tl.load(moments_ptr + row, mask=row < rows, other=0.0)
        mean_a = tl.load(moments_ptr + rows + row, mask=row < rows, other=0.0)
        rstd = tl.load(moments_ptr + 2 * rows + row, mask=row < rows, other=0.0)
        # normalised; beyond the row the gradient is zero, and so is every product with it
        s = (s - mean_s[:, None]) * rstd[:, None]
        a = (a - mean_a[:, None]) * rstd[:, None]
        scale_s += grad_s * s
        scale_a += grad_a * a
        shift_s += grad_s
        shift_a += grad_a
        grad_s = grad_s * weight_s[None, :]
        grad_a = grad_a * weight_a[None, :]
        common = (tl.sum(grad_s * s, axis=1) + tl.sum(grad_a * a, axis=1)) / (2 * HALF)
        mean_s = tl.sum(grad_s, axis=1) / HALF
        mean_a = tl.sum(grad_a, axis=1) / HALF
        s = rstd[:, None] * (grad_s - mean_s[:, None] - s * common[:, None])
        a = rstd[:, None] * (grad_a - mean_a[:, None] - a * common[:, None])
        tl.store(dx_ptr + target, s.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + target + HALF, a.to(dx_ptr.dtype.element_ty), mask=mask)
    partial = partial_ptr + program * (4 * HALF) + col
    tl.store(partial, tl.sum(scale_s, axis=0), mask=col < HALF)
    tl.store(partial + HALF, tl.sum(scale_a, axis=0), mask=col < HALF)
    tl.store(partial + 2 * HALF, tl.sum(shift_s, axis=0), mask=col < HALF)
    tl.store(partial + 3 * HALF, tl.sum(shift_a, axis=0), mask=col < HALF)


@cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile(half: int, config: Config) -> tuple[int, int]:
    """Rows of a program, 0 if not one fits, and the power of two that holds half a row."""
    block = triton.next_power_of_2(half)
    return config.elements // block, block


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, config: Config
) -> tuple[Tensor, Tensor]:
    """Rows of 2K channels to the same and the moments, (3, rows); K at most `LARGEST_HALF`."""
    rows, half = x.shape[0], x.shape[1] // 2
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    moments = torch.empty(3, rows, dtype=torch.float32, device=x.device)
    height, block = tile(half, config)
    forward_kernel[(triton.cdiv(rows, height),)](
        x,
        weight,
        bias,
        y,
        moments,
        rows,
        x.stride(0),
        eps,
        HALF=half,
        ROWS=height,
        BLOCK=block,
        num_warps=config.warps,
    )
    return y, moments


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, moments: Tensor, eps: float, config: Config
) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of scale and shift together, (2, 2K) in float32.

    `grad` is contiguous; eps is in the moments already.
    """
    rows, half = x.shape[0], x.shape[1] // 2
    height, block = tile(half, config)
    programs = min(PROGRAMS * processors(x.device), triton.cdiv(rows, height))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs, 2, 2 * half, dtype=torch.float32, device=x.device)
    backward_kernel[(programs,)](
        grad,
        x,
        weight,
        moments,
        dx,
        partial,
        rows,
        x.stride(0),
        HALF=half,
        ROWS=height,
        BLOCK=block,
        num_warps=config.warps,
    )
    return dx, partial.sum(0)
