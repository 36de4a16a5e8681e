"""Triton kernels of the equivariant linear maps; linear_launch.py launches them.

Both irreps are computed in one launch. They are products of the same shape that share nothing, so
without the nonlinearity a program computes a tile of one irrep's result; with it, a program
accumulates the tile of both, one after the other, and does the butterflies in registers before it
writes. Sums are float32; offsets of rows are 64 bits wide. Rows and columns outside of the result
read a valid row or column again and are not written; the axis that is summed over is masked.
Columns wrap around with a remainder, from which the compiler, unlike from a select, sees that
neighbours stay neighbours: loads of transposed factors are 16 bytes wide and asynchronous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deit.kernels.gelu_triton import butterfly, pointwise

__all__ = ["linear_act_kernel", "linear_kernel", "weight_grad_kernel"]


@triton.jit
def _channel(index, irrep, width, SEGMENT: tl.constexpr):
    """Where channel `index` of an irrep lies in a row; SEGMENT 0 is the packed layout."""
    if SEGMENT == 0:
        return irrep * width + index
    else:
        return (index // SEGMENT) * (2 * SEGMENT) + irrep * SEGMENT + index % SEGMENT


@triton.jit
def _tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tile number `pid`: GROUP tiles down, then the next column, so that the tiles that run at a
    time read few different rows and columns and find them in the L2 cache."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * tiles_n)
    first = group * GROUP
    height = min(tiles_m - first, GROUP)
    within = pid % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def _product(
    x_ptr,
    w_ptr,
    row,
    column,
    K,
    stride_x,
    stride_wn,
    stride_wk,
    irrep,
    SEGMENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile of x_irrep W^T at rows `row` and columns `column`, float32."""
    x_rows = x_ptr + row.to(tl.int64)[:, None] * stride_x
    w_columns = w_ptr + column[None, :] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_tile = x_rows + _channel(k, irrep, K, SEGMENT)[None, :]
        w_tile = w_columns + k[:, None] * stride_wk
        if EVEN_K:
            x = tl.load(x_tile)
            w = tl.load(w_tile)
        else:
            x = tl.load(x_tile, mask=(k < K)[None, :], other=0.0)
            w = tl.load(w_tile, mask=(k < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x_ptr,
    ws_ptr,
    wa_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_x,
    stride_wn,
    stride_wk,
    HAS_BIAS: tl.constexpr,
    IN_SEGMENT: tl.constexpr,
    OUT_SEGMENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = x W^T + b for M rows and, of each irrep, K channels to N; strides in elements.

    Neighbouring programs take the two irreps of a tile: they read and write the same lines of
    memory where irreps are interleaved.
    """
    irrep = tl.program_id(0) % 2
    tile_m, tile_n = _tile_of(tl.program_id(0) // 2, M, N, BLOCK_M, BLOCK_N, GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if irrep == 0:
        w_ptr = ws_ptr
    else:
        w_ptr = wa_ptr
    acc = _product(
        x_ptr,
        w_ptr,
        tl.where(row < M, row, 0),
        column % N,
        K,
        stride_x,
        stride_wn,
        stride_wk,
        irrep,
        IN_SEGMENT,
        EVEN_K,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
        acc += tl.where(irrep == 0, bias, 0.0)[None, :]
    y = y_ptr + row.to(tl.int64)[:, None] * (2 * N)
    y += _channel(column, irrep, N, OUT_SEGMENT)[None, :]
    mask = (row < M)[:, None] & (column < N)[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first and the second half of the columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _write_act(s, a, row, column, y_ptr, h_ptr, M, N, SAVE: tl.constexpr, QUICK: tl.constexpr):
    offset = row.to(tl.int64)[:, None] * (2 * N) + column[None, :]
    mask = (row < M)[:, None] & (column < N)[None, :]
    dtype = y_ptr.dtype.element_ty
    if SAVE:
        tl.store(h_ptr + offset, s.to(dtype), mask=mask)
        tl.store(h_ptr + offset + N, a.to(dtype), mask=mask)
    plus, minus = butterfly(s, a)
    s, a = butterfly(pointwise(plus, QUICK), pointwise(minus, QUICK))
    tl.store(y_ptr + offset, s.to(dtype), mask=mask)
    tl.store(y_ptr + offset + N, a.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["M"])
def linear_act_kernel(
    x_ptr,
    ws_ptr,
    wa_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    M,
    N,
    K,
    stride_x,
    stride_wn,
    stride_wk,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    QUICK: tl.constexpr,
    IN_SEGMENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The nonlinearity of x W^T + b, written to packed rows y, and with SAVE its argument to h."""
    tile_m, tile_n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = tl.where(row < M, row, 0)
    w_column = column % N
    s = _product(
        x_ptr,
        ws_ptr,
        x_row,
        w_column,
        K,
        stride_x,
        stride_wn,
        stride_wk,
        0,
        IN_SEGMENT,
        EVEN_K,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    a = _product(
        x_ptr,
        wa_ptr,
        x_row,
        w_column,
        K,
        stride_x,
        stride_wn,
        stride_wk,
        1,
        IN_SEGMENT,
        EVEN_K,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if HAS_BIAS:
        s += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    # Half of the columns at a time: the whole tile's intermediate values do not fit in registers.
    s_first, s_second = _halves(s, BLOCK_M, BLOCK_N)
    a_first, a_second = _halves(a, BLOCK_M, BLOCK_N)
    half = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    _write_act(s_first, a_first, row, half, y_ptr, h_ptr, M, N, SAVE, QUICK)
    _write_act(s_second, a_second, row, half + BLOCK_N // 2, y_ptr, h_ptr, M, N, SAVE, QUICK)


@triton.jit(do_not_specialize=["M", "rows_each"])
def weight_grad_kernel(
    grad_ptr,
    x_ptr,
    partial_ptr,
    M,
    N,
    K,
    rows_each,
    stride_grad,
    stride_x,
    IN_SEGMENT: tl.constexpr,
    OUT_SEGMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
):
    """grad^T x over `rows_each` rows, written to partial (splits, 2, N, K), float32."""
    irrep = tl.program_id(0) % 2
    split = tl.program_id(1)
    tile_n, tile_k = _tile_of(tl.program_id(0) // 2, N, K, BLOCK_N, BLOCK_K, GROUP)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    grad = grad_ptr + _channel(n, irrep, N, OUT_SEGMENT)[:, None]
    x = x_ptr + _channel(k, irrep, K, IN_SEGMENT)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    end = min(M, (split + 1) * rows_each)
    for start in range(split * rows_each, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        wide = row.to(tl.int64)
        g_mask = (n < N)[:, None] & (row < end)[None, :]
        x_mask = (row < end)[:, None] & (k < K)[None, :]
        g_tile = tl.load(grad + wide[None, :] * stride_grad, mask=g_mask, other=0.0)
        x_tile = tl.load(x + wide[:, None] * stride_x, mask=x_mask, other=0.0)
        acc = tl.dot(g_tile, x_tile, acc, input_precision=PRECISION)
    partial = partial_ptr + (split * 2 + irrep).to(tl.int64) * N * K
    mask = (n < N)[:, None] & (k < K)[None, :]
    tl.store(partial + n[:, None] * K + k[None, :], acc, mask=mask)
