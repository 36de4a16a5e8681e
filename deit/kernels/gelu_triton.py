"""Triton kernels of the mirror pair's nonlinearity; imported on first use, see backends.py.

A program handles a tile of ROWS x COLUMNS pairs (s, a), loads both and does the butterflies in
registers in float32. Rows may have any stride; offsets are 64 bits wide.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.tuning import Candidate

__all__ = ["BACKWARD", "FORWARD", "butterfly", "gelu", "gelu_backward", "pointwise"]


@triton.jit
def butterfly(p, q):
    """(p + q, p - q) / sqrt 2, which is its own inverse."""
    return (p + q) * 0.7071067811865476, (p - q) * 0.7071067811865476


@triton.jit
def pointwise(r, QUICK: tl.constexpr):
    if QUICK:
        return r / (1.0 + tl.exp(-1.702 * r))
    else:
        return 0.5 * r * (1.0 + tl.erf(r * 0.7071067811865476))


@triton.jit
def slope(r, QUICK: tl.constexpr):
    """The derivative of `pointwise`."""
    if QUICK:
        sigmoid = 1.0 / (1.0 + tl.exp(-1.702 * r))
        return sigmoid * (1.0 + 1.702 * r * (1.0 - sigmoid))
    else:
        density = 0.3989422804014327 * tl.exp(-0.5 * r * r)
        return 0.5 * (1.0 + tl.erf(r * 0.7071067811865476)) + r * density


@triton.jit
def _tile(rows, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's row and column indices and which of its elements exist."""
    tiles = tl.cdiv(K, COLUMNS)
    pid = tl.program_id(0)
    row = (pid // tiles) * ROWS + tl.arange(0, ROWS)
    column = (pid % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < K)[None, :]
    return row.to(tl.int64)[:, None], column[None, :], mask


@triton.jit(do_not_specialize=["rows"])
def gelu_kernel(
    x_ptr,
    y_ptr,
    rows,
    K,
    stride_x,
    QUICK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, mask = _tile(rows, K, ROWS, COLUMNS)
    x = x_ptr + row * stride_x + column
    y = y_ptr + row * (2 * K) + column
    s = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(x + K, mask=mask, other=0.0).to(tl.float32)
    plus, minus = butterfly(s, a)
    s, a = butterfly(pointwise(plus, QUICK), pointwise(minus, QUICK))
    tl.store(y, s.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y + K, a.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def gelu_backward_kernel(
    grad_ptr,
    x_ptr,
    dx_ptr,
    rows,
    K,
    stride_grad,
    stride_x,
    QUICK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, mask = _tile(rows, K, ROWS, COLUMNS)
    grad = grad_ptr + row * stride_grad + column
    x = x_ptr + row * stride_x + column
    dx = dx_ptr + row * (2 * K) + column
    s = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(x + K, mask=mask, other=0.0).to(tl.float32)
    ds = tl.load(grad, mask=mask, other=0.0).to(tl.float32)
    da = tl.load(grad + K, mask=mask, other=0.0).to(tl.float32)
    plus, minus = butterfly(s, a)
    d_plus, d_minus = butterfly(ds, da)
    ds, da = butterfly(d_plus * slope(plus, QUICK), d_minus * slope(minus, QUICK))
    tl.store(dx, ds.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx + K, da.to(dx_ptr.dtype.element_ty), mask=mask)


# Rows and columns of a tile and warps. 128 columns divide the widths 384, 512, 640, 768 and 1024
# of an irrep, and all hidden ones, without a rest.
TILES = ((8, 128, 4), (16, 128, 4), (16, 128, 8), (2, 512, 4))


def _grid(rows: int, k: int, tile: tuple[int, int, int]) -> tuple[int]:
    return (triton.cdiv(rows, tile[0]) * triton.cdiv(k, tile[1]),)


def gelu(x: Tensor, act: str, tile: tuple[int, int, int] = TILES[0]) -> Tensor:
    """(rows, 2K) -> (rows, 2K); the last axis of `x` is contiguous."""
    rows, k = x.shape[0], x.shape[1] // 2
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gelu_kernel[_grid(rows, k, tile)](
        x, y, rows, k, x.stride(0), act == "quick_gelu", tile[0], tile[1], num_warps=tile[2]
    )
    return y


def gelu_backward(
    grad: Tensor, x: Tensor, act: str, tile: tuple[int, int, int] = TILES[0]
) -> Tensor:
    """The gradient with respect to `x`; the last axes of both inputs are contiguous."""
    rows, k = x.shape[0], x.shape[1] // 2
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gelu_backward_kernel[_grid(rows, k, tile)](
        grad,
        x,
        dx,
        rows,
        k,
        grad.stride(0),
        x.stride(0),
        act == "quick_gelu",
        tile[0],
        tile[1],
        num_warps=tile[2],
    )
    return dx


def _candidates(launch: Callable[..., Tensor]) -> tuple[Candidate, ...]:
    def candidate(tile: tuple[int, int, int]) -> Candidate:
        return Candidate("triton_{}x{}x{}".format(*tile), lambda *args: launch(*args, tile))

    return tuple(candidate(tile) for tile in TILES)


FORWARD, BACKWARD = _candidates(gelu), _candidates(gelu_backward)
