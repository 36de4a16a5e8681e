"""What every test of a layer does: randomise it, act with the group, in both precisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deit.equivariance import (
    Action,
    as_parts,
    assert_equivariant,
    channels,
    compose,
    randomize_,
    tokens,
)
from deit.groups import FLOP, OCTIC, Group, Rep
from deit.layers import MirrorGrid

BOTH_GROUPS = pytest.mark.parametrize("group", [FLOP, OCTIC], ids=lambda group: group.name)


def features(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_layer(layer: nn.Module, seed: int = 0) -> Any:
    """The layer with all parameters random, in float64 and evaluation mode."""
    return randomize_(layer.double(), seed).eval()


def halves(x: Tensor, dim: int = -1) -> tuple[Tensor, ...]:
    """The parts s and a of a packed feature."""
    return tuple(x.chunk(2, dim))


def cat(x: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Parts side by side along the last axis."""
    return torch.cat(as_parts(x), -1)


class Packed(nn.Module):
    """A layer of parts as one of packed features; images as they are.

    `rep` says how the input is split; by default it is the layer's own.
    """

    def __init__(self, layer: nn.Module, rep: Rep | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.rep = rep or getattr(layer, "in_rep", None) or layer.rep

    def forward(self, x: Tensor) -> Tensor:
        return cat(self.layer(tuple(self.rep.split(x)) if self.rep.free else x))


def on_tokens(dim: int, grid: MirrorGrid) -> Action:
    """Flopping of packed tokens in mirror order, (B, N, dim)."""
    return compose(channels(FLOP.regular(dim)), tokens(grid.mirror))


def check(
    layer: nn.Module, x: Tensor, on_input: Action, on_output: Action, group: Group = FLOP
) -> None:
    """Assert equivariance to rounding in float64, and in float32, with all parameters random."""
    random_layer(layer)
    for dtype in (torch.float32, torch.float64):
        assert_equivariant(layer.to(dtype), group, x.to(dtype), on_input, on_output)


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
