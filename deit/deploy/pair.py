"""What folded networks have in common: layers of a pair (s, a), made of standard ones.

Features are two tensors of half the channels each. Nothing here knows of a group any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from deit.deploy.weights import Map, Pair, linear
from deit.layers import tracing

__all__ = ["Each", "PairMlp", "PairNorm", "Residual", "Target"]

Target = Literal["torch", "onnx"]


class Residual(nn.Sequential):
    """x + layers(x), of both parts."""

    def forward(self, x: Pair) -> Pair:
        s, a = super().forward(x)
        return x[0] + s, x[1] + a


class Each(nn.Module):
    """A layer for each part."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Pair) -> Pair:
        return self.first(x[0]), self.second(x[1])


class PairNorm(nn.Module):
    """Both parts divided by sqrt((mean s^2 + mean a^2 + eps) / 2), over the last axis.

    That is the LayerNorm of features in parts without its scales and shift, which the next layer
    has taken in. `centre` says of which parts the means are to be subtracted first. The others have
    mean zero already.
    """

    def __init__(self, eps: float, centre: tuple[bool, bool], dim: int = -1):
        super().__init__()
        self.eps, self.centre, self.dim = eps, centre, dim

    def forward(self, x: Pair) -> Pair:
        dim = self.dim
        wide = [tracing.widen(part) for part in x]
        wide = [
            part - part.mean(dim, keepdim=True) if centre else part
            for part, centre in zip(wide, self.centre, strict=True)
        ]
        s, a = (part.square().mean(dim, keepdim=True) for part in wide)
        rstd = torch.rsqrt((s + a + self.eps) * 0.5)
        return tuple((part * rstd).to(own.dtype) for part, own in zip(wide, x, strict=True))

    def extra_repr(self) -> str:
        return f"eps={self.eps}, centre={self.centre}, dim={self.dim}"


class PairMlp(nn.Module):
    """Linear maps before and after a nonlinearity of (s + a, s - a).

    Args:
        first, second: the maps of s and a; they have taken in the factors of the change of basis.
        act: the nonlinearity, a module.
    """

    # A CPU in eager mode runs so many rows at a time: narrow networks then stay in its cache, and
    # wide ones still have enough rows for their products; see docs/performance-log.md.
    CHUNK_ROWS = 640

    def __init__(self, first: Sequence[Map], second: Sequence[Map], act: nn.Module):
        super().__init__()
        self.fc1_s, self.fc1_a = map(linear, first)
        self.fc2_s, self.fc2_a = map(linear, second)
        self.act = act

    def forward(self, x: Pair) -> Pair:  # parts (..., C/2)
        s, a = x
        if not may_cut(s):
            return self.whole(s, a)
        shape = s.shape[:-1]
        s, a = (part.flatten(0, -2).split(self.CHUNK_ROWS) for part in x)
        chunks = [self.whole(*chunk) for chunk in zip(s, a, strict=True)]
        s, a = (torch.cat(part) for part in zip(*chunks, strict=True))
        return s.unflatten(0, shape), a.unflatten(0, shape)

    def whole(self, s: Tensor, a: Tensor) -> Pair:
        """All rows at once."""
        hs, ha = self.fc1_s(s), self.fc1_a(a)
        plus, minus = self.act(hs + ha), self.act(hs - ha)
        return self.fc2_s(plus + minus), self.fc2_a(plus - minus)


def may_cut(x: Tensor) -> bool:
    """Whether a layer may cut its input into chunks: in eager mode on a CPU.

    Compilers, exporters and tracers work on stand-ins, and shall see one graph for all sizes.
    """
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )
