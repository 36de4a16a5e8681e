"""Tile sizes and launches of the kernels in linear_triton.py; imported on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from deit.kernels.linear_triton import linear_act_kernel, linear_kernel, weight_grad_kernel
from deit.kernels.tuning import Candidate, tf32_allowed

__all__ = [
    "act_candidates",
    "config_of",
    "linear",
    "linear_act",
    "linear_candidates",
    "size_hint",
    "weight_grad",
    "weight_grad_candidates",
    "weight_grad_parts",
]


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
LINEAR_FLOAT32 = WEIGHT_GRAD_FLOAT32 = (Config(64, 64, 32, 3, 4), Config(128, 128, 32, 3, 8))
ACT_FLOAT32 = (Config(64, 64, 32, 3, 4),)
GROUP = 8
SPLITS_UP_TO = 64
UNKNOWN_ROWS = 1 << 13


def config_of(name: str) -> Config:
    """The configuration of this name."""
    return Config(*map(int, name.removeprefix("triton_").split("x")))


def precision(x: Tensor) -> str:
    """How tl.dot treats float32 factors: as torch's own products on this device would."""
    return "tf32" if x.dtype == torch.float32 and tf32_allowed() else "ieee"


def _segment(segment: int, width: int) -> int:
    return 0 if segment == width else segment


def _parameters(ws: Tensor, wa: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The weights with the same strides, and the bias or a tensor that nothing reads."""
    if ws.stride() != wa.stride():
        ws, wa = ws.contiguous(), wa.contiguous()
    return ws, wa, ws if bias is None else bias.contiguous()


def _options(config: Config, x: Tensor, axes: str) -> dict[str, Any]:
    """Of every launch; `axes` names those of rows, columns and depth of the tiles."""
    sizes = zip(axes, config[:3], strict=True)
    return dict(
        {f"BLOCK_{axis}": size for axis, size in sizes},
        GROUP=GROUP,
        PRECISION=precision(x),
        num_stages=config.stages,
        num_warps=config.warps,
    )


def linear(
    x: Tensor,
    ws: Tensor,
    wa: Tensor,
    bias: Tensor | None,
    in_segment: int,
    out_segment: int,
    config: Config = LINEAR[0],
    kernel: Any = None,
) -> Tensor:
    """(rows, 2K) -> (rows, 2N); the last axis of `x` is contiguous.

    Here and below, `kernel` is the kernel itself unless given: wrapped, for a compiler.
    """
    (m, _), (n, k) = x.shape, ws.shape
    ws, wa, shift = _parameters(ws, wa, bias)
    y = torch.empty(m, 2 * n, dtype=x.dtype, device=x.device)
    args = (x, ws, wa, shift, y, m, n, k, x.stride(0), *ws.stride())
    grid = (2 * triton.cdiv(m, config.rows) * triton.cdiv(n, config.columns),)
    (kernel or linear_kernel)[grid](
        *args,
        HAS_BIAS=bias is not None,
        IN_SEGMENT=_segment(in_segment, k),
        OUT_SEGMENT=_segment(out_segment, n),
        EVEN_K=k % config.depth == 0,
        **_options(config, x, "MNK"),
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
    kernel: Any = None,
) -> tuple[Tensor, Tensor]:
    """(rows, 2K) -> packed (rows, 2N) after the nonlinearity and, if `save`, before it."""
    (m, _), (n, k) = x.shape, ws.shape
    ws, wa, shift = _parameters(ws, wa, bias)
    y = torch.empty(m, 2 * n, dtype=x.dtype, device=x.device)
    h = torch.empty_like(y) if save else y.new_empty(0)
    saved = h if save else shift  # not written then; one without elements has no address
    args = (x, ws, wa, shift, y, saved, m, n, k, x.stride(0), *ws.stride())
    grid = (triton.cdiv(m, config.rows) * triton.cdiv(n, config.columns),)
    (kernel or linear_act_kernel)[grid](
        *args,
        HAS_BIAS=bias is not None,
        SAVE=save,
        QUICK=act == "quick_gelu",
        IN_SEGMENT=_segment(in_segment, k),
        EVEN_K=k % config.depth == 0,
        **_options(config, x, "MNK"),
    )
    return y, h


def size_hint(size: int | torch.SymInt) -> int:
    """A size, or what a compiler that keeps it open has seen of it."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else UNKNOWN_ROWS


def _splits(rows: int, tiles: int, depth: int, device: torch.device) -> int:
    """Parts of the sum over rows: enough programs for two on each multiprocessor."""
    if device.type == "cuda":
        programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    else:
        programs = 8
    return max(1, min(SPLITS_UP_TO, programs // tiles, triton.cdiv(rows, 4 * depth)))


def weight_grad_parts(
    grad: Tensor,
    x: Tensor,
    in_segment: int,
    out_segment: int,
    config: Config = WEIGHT_GRAD[0],
    kernel: Any = None,
) -> Tensor:
    """Gradients of the weights, of parts of the rows: (parts, 2, N, K), float32."""
    m, n, k = x.shape[0], grad.shape[1] // 2, x.shape[1] // 2
    tiles = 2 * triton.cdiv(n, config.rows) * triton.cdiv(k, config.columns)
    splits = _splits(size_hint(m), tiles, config.depth, x.device)
    rows_each = triton.cdiv(triton.cdiv(m, splits), config.depth) * config.depth
    if isinstance(m, int):  # else parts without rows are zero
        splits = triton.cdiv(m, rows_each)
    partial = torch.empty(splits, 2, n, k, dtype=torch.float32, device=x.device)
    args = (grad, x, partial, m, n, k, rows_each, grad.stride(0), x.stride(0))
    (kernel or weight_grad_kernel)[(tiles, splits)](
        *args,
        IN_SEGMENT=_segment(in_segment, k),
        OUT_SEGMENT=_segment(out_segment, n),
        **_options(config, x, "NKM"),
    )
    return partial


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
    partial = weight_grad_parts(grad, x, in_segment, out_segment, config)
    # Copies: outputs of an operation must not share memory.
    dws, dwa = (total.to(x.dtype, copy=True) for total in partial.sum(0))
    if not with_bias:
        return dws, dwa, grad.new_empty(0)
    parts = grad.unflatten(1, (-1, 2, out_segment))[:, :, 0]
    return dws, dwa, parts.sum(0, dtype=x.dtype).flatten()  # a sum under autocast is float32


def _candidates(launch: Callable[..., Any], configs: tuple[Config, ...]) -> list[Candidate]:
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
