"""Dropout and stochastic depth of features in parts."""

import torch
from timm.layers import DropPath as TensorDropPath
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """Dropout of every part, each entry by itself. Features stay equivariant in distribution."""

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(super(Dropout, self).forward(part) for part in x)


class DropPath(TensorDropPath):
    """Stochastic depth (arXiv:1603.09382): one draw a sample, for all parts."""

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self.training or self.drop_prob == 0.0:
            return x
        first = x[0]
        shape = first.shape[:1] + (1,) * (first.ndim - 1)
        keep = 1.0 - self.drop_prob
        if torch.compiler.is_compiling():
            # One graph for blocks of all rates: `bernoulli_`, and in torch before 2.14 a comparison
            # with `keep` too, would fix the rate.
            mask = torch.rand(shape, dtype=first.dtype, device=first.device) >= self.drop_prob
        else:
            mask = first.new_empty(shape).bernoulli_(keep)  # timm's own draw
        # not in place as in timm, whose division is lost where tools drop results that nobody uses
        mask = mask / keep if keep > 0.0 else mask
        return tuple(part * mask.to(part.dtype) for part in x)
