"""The two-layer perceptron of transformer and MLP blocks, on features in parts."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep
from deit.layers.activation import GELU
from deit.layers.drop import Dropout
from deit.layers.linear import Linear, as_rep


class Mlp(nn.Module):
    """fc1, GELU, dropout, fc2, dropout; parts (..., features) to the same.

    Args:
        features: size of all parts together, or their representation.
        hidden_features: width between the two layers.
        act, scale: as in `GELU`.
        drop: dropout rate.
        invariant, prefix: as in `Linear`.
    """

    def __init__(
        self,
        features: int | Rep,
        hidden_features: int,
        *,
        bias: bool = True,
        act: Callable[[Tensor], Tensor] = F.gelu,
        scale: float = 1.0,
        drop: float = 0.0,
        group: Group = FLOP,
        **options: Any,
    ) -> None:
        super().__init__()
        rep = as_rep(features, group)
        hidden = rep.group.regular(hidden_features)
        self.fc1 = Linear(rep, hidden, bias, **options)
        self.act = GELU(hidden, act, scale=scale)
        self.drop1 = Dropout(drop)
        self.fc2 = Linear(hidden, rep, bias, **options)
        self.drop2 = Dropout(drop)

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))
