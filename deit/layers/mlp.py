"""The two-layer perceptron of transformer and MLP blocks, on packed features."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep
from deit.layers import fused
from deit.layers.activation import GELU
from deit.layers.linear import Linear, as_rep

__all__ = ["Mlp", "perceptron"]


class Mlp(nn.Module):
    """fc1, GELU, dropout, fc2, dropout: (..., features) -> (..., features).

    Args:
        features: size of the last axis, or its representation.
        hidden_features: width between the two layers.
        act: the pointwise function inside `GELU`.
        drop: dropout rate.
        across, prefix: as in `Linear`.
    """

    def __init__(
        self,
        features: int | Rep,
        hidden_features: int,
        *,
        bias: bool = True,
        act: Callable[[Tensor], Tensor] = F.gelu,
        drop: float = 0.0,
        group: Group = FLOP,
        across: Rep | None = None,
        prefix: str = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rep = as_rep(features, group)
        hidden = rep.group.regular(hidden_features)
        options = dict(across=across, prefix=prefix, device=device, dtype=dtype)
        self.fc1 = Linear(rep, hidden, bias, **options)
        self.act = GELU(hidden, act, across=across)
        self.fc2 = Linear(hidden, rep, bias, **options)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return perceptron(x, self.fc1, self.act, self.fc2, self.drop)


def perceptron(
    x: Tensor, fc1: Linear, act: GELU, fc2: Linear, drop: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """fc2(act(fc1 x)), with `drop` after both, irrep by irrep: (..., features) -> the same.

    The constant factors of the activation are left to the matrix products.
    """
    y = fused.perceptron(x, fc1, act, fc2, drop)
    if y is not None:
        return y
    parts = act.map(fc1.map(fc1.in_rep.split(x), out_gain=act.gain))
    if drop is not None:
        parts = [drop(part) for part in parts]
    x = torch.cat(fc2.map(parts, in_gain=act.gain), -1)
    return x if drop is None else drop(x)
