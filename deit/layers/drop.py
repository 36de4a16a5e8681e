"""Dropout and stochastic depth of features in parts."""

from __future__ import annotations

import torch
from timm.layers import DropPath as TensorDropPath
from torch import Tensor, nn

__all__ = ["DropPath", "Dropout"]


class Dropout(nn.Dropout):
    """Dropout of every part, each entry by itself. Features stay equivariant in distribution."""

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(super(Dropout, self).forward(part) for part in x)


class DropPath(TensorDropPath):
    """Stochastic depth (arXiv:1603.09382): one draw a sample, for all parts."""

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.drop_prob == 0.0 or not self.training:
            return x
        first = x[0]
        shape = first.shape[:1] + (1,) * (first.ndim - 1)
        if torch.compiler.is_compiling() and self.drop_prob < 1.0:
            # `bernoulli_` would fix the rate: like this one graph serves blocks of all rates
            keep = 1.0 - self.drop_prob
            mask = (torch.rand(shape, dtype=first.dtype, device=first.device) < keep) / keep
        else:
            mask = super().forward(first.new_ones(shape))  # timm's own draw
        return tuple(part * mask.to(part.dtype) for part in x)
