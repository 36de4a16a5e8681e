"""What every test of a layer does: randomise it, act with the group, in both precisions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from deit.equivariance import Action, assert_equivariant, equivariance_error, randomize_
from deit.groups import FLOP, OCTIC, Group, Rep

BOTH_GROUPS = pytest.mark.parametrize("group", [FLOP, OCTIC], ids=lambda group: group.name)
# a property test tries this many shapes, the same ones on every run
few = settings(max_examples=12, deadline=None, derandomize=True)


def features(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_layer(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer with all parameters random, in float64 and evaluation mode."""
    return randomize_(layer.double(), seed).eval()


class Packed(nn.Module):
    """A layer of parts as one of packed features, side by side along `dim`; images as they are.

    `rep` says how the input is split; by default it is the layer's own.
    """

    def __init__(self, layer: nn.Module, rep: Rep | None = None, dim: int = -1) -> None:
        super().__init__()
        self.layer = layer
        self.dim = dim
        self.rep = rep or getattr(layer, "in_rep", None) or layer.rep

    def forward(self, x: Tensor) -> Tensor:
        parts = tuple(self.rep.split(x, self.dim)) if self.rep.free else x
        y = self.layer(parts)
        return torch.cat(y, self.dim) if isinstance(y, tuple) else y


def check(
    layer: nn.Module, x: Tensor, on_input: Action, on_output: Action, group: Group = FLOP
) -> None:
    """Assert equivariance to 1e-10 in float64, and in float32, with all parameters random."""
    random_layer(layer)
    for dtype in (torch.float32, torch.float64):
        assert_equivariant(layer.to(dtype), group, x.to(dtype), on_input, on_output)


def breaks(
    module: Callable[[Tensor], Tensor],
    x: Tensor,
    on_input: Action,
    on_output: Action,
    group: Group = FLOP,
) -> None:
    """Assert that a broken twin is far from equivariant, so that `check` could have failed."""
    with torch.no_grad():
        report = equivariance_error(module, group, x, on_input, on_output)
    assert report.error > 1e-3


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def parts(x: Tensor, tokens: Rep, c: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ss, sa, as, aa (channels first) of (B, tokens, 2c), symmetric tokens in the first rows."""
    n = tokens.invariant
    return x[:, :n, :c], x[:, n:, :c], x[:, :n, c:], x[:, n:, c:]
