"""Triton kernels of the equivariant linear maps; imported on first use, see backends.py.

Both irreps are computed in one launch. They are products of the same shape that share nothing, so
without the nonlinearity a program computes a tile of one irrep's result; with it, a program
accumulates the tile of both, one after the other, and does the butterflies in registers before it
writes. Sums are float32; offsets of rows are 64 bits wide. Rows and columns outside of the result
read a valid row or column again and are not written; the axis that is summed over is masked.
Columns wrap around with a remainder, from which the compiler, unlike from a select, sees that
neighbours stay neighbours: loads of transposed factors are 16 bytes wide and asynchronous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit.kernels.gelu_triton import butterfly, pointwise
from deit.kernels.tuning import Candidate, tf32_allowed

__all__ = ["act_candidates", "linear_candidates", "weight_grad_candidates"]


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
    # Neighbouring programs take the two irreps of a tile: they read and write the same lines of
    # memory where irreps are interleaved.
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


class Config(NamedTuple):
    """Tile of the result, depth of a step of the sum, stages of the pipeline, warps."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int

    @property
    def name(self) -> str:
        return "triton_" + "x".join(map(str, self))


# For factors of two bytes each; benchmarks/kernel_resources.py prints what they take.
LINEAR = (
    Config(128, 128, 64, 3, 4),
    Config(128, 256, 64, 3, 8),
    Config(128, 64, 64, 4, 4),
    Config(64, 64, 64, 4, 4),
)
ACT = (
    Config(128, 128, 32, 4, 8),
    Config(128, 64, 64, 3, 8),
    Config(64, 64, 64, 4, 4),
)
WEIGHT_GRAD = (
    Config(128, 128, 64, 3, 4),
    Config(128, 128, 64, 3, 8),
    Config(128, 128, 32, 4, 4),
    Config(64, 64, 64, 4, 4),
)
# For factors of four bytes: products without tensor cores leave more to the registers.
LINEAR_FLOAT32 = ACT_FLOAT32 = WEIGHT_GRAD_FLOAT32 = (Config(64, 64, 32, 3, 4),)
GROUP = 8
SPLITS_UP_TO = 64


def precision(x: Tensor) -> str:
    """How tl.dot treats float32 factors: as torch's own products on this device would."""
    return "tf32" if x.dtype == torch.float32 and tf32_allowed() else "ieee"


def _segment(segment: int, width: int) -> int:
    return 0 if segment == width else segment


def _same_strides(ws: Tensor, wa: Tensor) -> tuple[Tensor, Tensor]:
    return (ws, wa) if ws.stride() == wa.stride() else (ws.contiguous(), wa.contiguous())


def linear(
    x: Tensor,
    ws: Tensor,
    wa: Tensor,
    bias: Tensor | None,
    in_segment: int,
    out_segment: int,
    config: Config = LINEAR[0],
) -> Tensor:
    """(rows, 2K) -> (rows, 2N); the last axis of `x` is contiguous."""
    (m, _), (n, k) = x.shape, ws.shape
    ws, wa = _same_strides(ws, wa)
    y = torch.empty(m, 2 * n, dtype=x.dtype, device=x.device)
    grid = (2 * triton.cdiv(m, config.rows) * triton.cdiv(n, config.columns),)
    linear_kernel[grid](
        x,
        ws,
        wa,
        x if bias is None else bias.contiguous(),  # a pointer that nothing reads
        y,
        m,
        n,
        k,
        x.stride(0),
        *ws.stride(),
        HAS_BIAS=bias is not None,
        IN_SEGMENT=_segment(in_segment, k),
        OUT_SEGMENT=_segment(out_segment, n),
        EVEN_K=k % config.depth == 0,
        PRECISION=precision(x),
        BLOCK_M=config.rows,
        BLOCK_N=config.columns,
        BLOCK_K=config.depth,
        GROUP=GROUP,
        num_stages=config.stages,
        num_warps=config.warps,
    )
    return y


def linear_act(
    x: Tensor,
    ws: Tensor,
    wa: Tensor,
    bias: Tensor | None,
    in_segment: int,
    act: str,
    save: bool,
    config: Config = ACT[0],
) -> tuple[Tensor, Tensor]:
    """(rows, 2K) -> packed (rows, 2N) after the nonlinearity and, if `save`, before it."""
    (m, _), (n, k) = x.shape, ws.shape
    ws, wa = _same_strides(ws, wa)
    y = torch.empty(m, 2 * n, dtype=x.dtype, device=x.device)
    h = torch.empty_like(y) if save else y.new_empty(0)
    grid = (triton.cdiv(m, config.rows) * triton.cdiv(n, config.columns),)
    linear_act_kernel[grid](
        x,
        ws,
        wa,
        x if bias is None else bias.contiguous(),
        y,
        h if save else y,  # not written
        m,
        n,
        k,
        x.stride(0),
        *ws.stride(),
        HAS_BIAS=bias is not None,
        SAVE=save,
        QUICK=act == "quick_gelu",
        IN_SEGMENT=_segment(in_segment, k),
        EVEN_K=k % config.depth == 0,
        PRECISION=precision(x),
        BLOCK_M=config.rows,
        BLOCK_N=config.columns,
        BLOCK_K=config.depth,
        GROUP=GROUP,
        num_stages=config.stages,
        num_warps=config.warps,
    )
    return y, h


def _splits(rows: int, tiles: int, depth: int, device: torch.device) -> int:
    """Parts of the sum over rows: enough programs for two on each multiprocessor."""
    if device.type == "cuda":
        programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    else:
        programs = 8
    return max(1, min(SPLITS_UP_TO, programs // tiles, triton.cdiv(rows, 4 * depth)))


def weight_grad(
    grad: Tensor,
    x: Tensor,
    in_segment: int,
    out_segment: int,
    with_bias: bool,
    config: Config = WEIGHT_GRAD[0],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the weights (N, K), summed over rows in parts that are then added in a fixed
    order, and of the bias (N,), empty without `with_bias`."""
    m, n, k = x.shape[0], grad.shape[1] // 2, x.shape[1] // 2
    tiles = 2 * triton.cdiv(n, config.rows) * triton.cdiv(k, config.columns)
    splits = _splits(m, tiles, config.depth, x.device)
    rows_each = triton.cdiv(triton.cdiv(m, splits), config.depth) * config.depth
    splits = triton.cdiv(m, rows_each)
    partial = torch.empty(splits, 2, n, k, dtype=torch.float32, device=x.device)
    weight_grad_kernel[(tiles, splits)](
        grad,
        x,
        partial,
        m,
        n,
        k,
        rows_each,
        grad.stride(0),
        x.stride(0),
        IN_SEGMENT=_segment(in_segment, k),
        OUT_SEGMENT=_segment(out_segment, n),
        PRECISION=precision(x),
        BLOCK_N=config.rows,
        BLOCK_K=config.columns,
        BLOCK_M=config.depth,
        GROUP=GROUP,
        num_stages=config.stages,
        num_warps=config.warps,
    )
    dws, dwa = (partial[:, irrep].sum(0).to(x.dtype) for irrep in range(2))
    if not with_bias:
        return dws, dwa, grad.new_empty(0)
    return dws, dwa, grad.unflatten(1, (-1, 2, out_segment))[:, :, 0].sum(0).flatten()


def _candidates(launch, configs: tuple[Config, ...]) -> list[Candidate]:
    def candidate(config: Config) -> Candidate:
        return Candidate(config.name, lambda *args: launch(*args, config))

    return [candidate(config) for config in configs]


def linear_candidates(dtype: torch.dtype) -> list[Candidate]:
    """Implementations of `deit::mirror_linear` for factors of this dtype."""
    return _candidates(linear, LINEAR_FLOAT32 if dtype == torch.float32 else LINEAR)


def act_candidates(dtype: torch.dtype) -> list[Candidate]:
    """Implementations of `deit::mirror_linear_act`."""
    return _candidates(linear_act, ACT_FLOAT32 if dtype == torch.float32 else ACT)


def weight_grad_candidates(dtype: torch.dtype) -> list[Candidate]:
    """Implementations of `deit::mirror_linear_weight_grad`."""
    configs = WEIGHT_GRAD_FLOAT32 if dtype == torch.float32 else WEIGHT_GRAD
    return _candidates(weight_grad, configs)
