"""Dropout and stochastic depth of features in parts."""

from __future__ import annotations

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
        # timm's own draw, on ones: the mask of each sample, (B, 1, ...)
        first = x[0]
        mask = super().forward(first.new_ones(first.shape[:1] + (1,) * (first.ndim - 1)))
        return tuple(part * mask for part in x)
