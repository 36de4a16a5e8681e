r"""Pointwise nonlinearities of packed features.

A pointwise function commutes with permutations, so it is applied in the regular basis: for flopping
r+- = (s +- a)/sqrt 2, g+- = GELU(r+-), s' = (g+ + g-)/sqrt 2, a' = (g+ - g-)/sqrt 2
(arXiv:2502.05169, section 3). When the tokens are decomposed too, both axes are transformed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep
from deit.layers.linear import as_rep

__all__ = ["GELU", "quick_gelu"]


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation of GELU that ResMLP uses; any shape."""
    return x * torch.sigmoid(1.702 * x)


class GELU(nn.Module):
    """`act` in the regular basis of the last axis, and of the one before it if `across` is given.

    Args:
        features: size of the last axis, or its representation.
        act: a pointwise function; the exact (erf) GELU by default.
        across: representation along the axis before the last, if that is decomposed as well.
    """

    def __init__(
        self,
        features: int | Rep,
        act: Callable[[Tensor], Tensor] = F.gelu,
        *,
        group: Group = FLOP,
        across: Rep | None = None,
    ) -> None:
        super().__init__()
        self.rep = as_rep(features, group)
        self.act = act
        self.across = across

    def forward(self, x: Tensor) -> Tensor:  # (..., [across,] features), same shape
        x = self.rep.to_regular(x)
        if self.across is not None:
            x = self.across.to_regular(x, -2)
        x = self.act(x)
        if self.across is not None:
            x = self.across.from_regular(x, -2)
        return self.rep.from_regular(x)

    def extra_repr(self) -> str:
        return f"{self.rep.size}, act={getattr(self.act, '__name__', self.act)}"
