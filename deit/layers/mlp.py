"""The two-layer perceptron of transformer and MLP blocks, on packed features."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep
from deit.layers.activation import GELU
from deit.layers.linear import Linear, as_rep

__all__ = ["Mlp"]


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
        gain = self.act.gain
        parts = self.fc1.map(self.fc1.in_rep.split(x), out_gain=gain)
        parts = [self.drop(part) for part in self.act.map(parts)]
        return self.drop(torch.cat(self.fc2.map(parts, in_gain=gain), -1))
