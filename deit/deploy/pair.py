"""What folded networks have in common: layers of a pair (s, a), made of standard ones.

Features are two tensors of half the channels each. Nothing here knows of a group any more.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from deit.deploy.weights import Map, Pair, linear
from deit.layers import tracing
from deit.models.base import Scriptable

Target = Literal["torch", "onnx"]


class Each(nn.Module):
    """A layer for each part."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Pair) -> Pair:
        return self.first(x[0]), self.second(x[1])


class Residual(nn.Sequential):
    """x + layers(x), of both parts."""

    def forward(self, x: Pair) -> Pair:
        s, a = super().forward(x)
        return x[0] + s, x[1] + a


class PairNorm(nn.Module):
    """Both parts divided by sqrt((mean s^2 + mean a^2 + eps) / 2), over one axis.

    That is the LayerNorm of features in parts without its scales and shift, which the next layer
    has taken in. `centre` says of which parts the means are to be subtracted first. The others have
    mean zero already.
    """

    def __init__(self, eps: float, centre: tuple[bool, bool] = (True, True), dim: int = -1):
        super().__init__()
        self.eps, self.centre, self.dim = eps, centre, dim

    def forward(self, x: Pair) -> Pair:
        wide = [
            part - part.mean(self.dim, keepdim=True) if centre else part
            for part, centre in zip(map(tracing.widen, x), self.centre, strict=True)
        ]
        s, a = (part.square().mean(self.dim, keepdim=True) for part in wide)
        rstd = torch.rsqrt((s + a + self.eps) * 0.5)
        return tuple((part * rstd).to(own.dtype) for part, own in zip(wide, x, strict=True))

    def extra_repr(self) -> str:
        return f"eps={self.eps}, centre={self.centre}, dim={self.dim}"


class PairMlp(nn.Module):
    """A nonlinearity of (s + a, s - a) between two layers of pairs.

    They have taken in the factors of the change of basis.
    """

    def __init__(self, fc1: nn.Module, act: nn.Module, fc2: nn.Module):
        super().__init__()
        self.fc1, self.act, self.fc2 = fc1, act, fc2

    def forward(self, x: Pair) -> Pair:
        s, a = self.fc1(x)
        plus, minus = self.act(s + a), self.act(s - a)
        return self.fc2((plus + minus, plus - minus))


class RowMlp(PairMlp):
    """A PairMlp of two linear maps for each part, over the last axis."""

    # A CPU in eager mode runs so many rows at a time: narrow networks then stay in its cache, and
    # wide ones still have enough rows for their products; see docs/performance-log.md.
    CHUNK_ROWS = 640

    def __init__(self, first: Sequence[Map], act: nn.Module, second: Sequence[Map]):
        super().__init__(Each(*map(linear, first)), act, Each(*map(linear, second)))

    def forward(self, x: Pair) -> Pair:  # parts (..., C/2)
        # Compilers, exporters and tracers work on stand-ins, and shall see one graph for all sizes.
        standing_in = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if standing_in or type(x[0]) is not Tensor or x[0].device.type != "cpu":
            return super().forward(x)
        rows = (part.flatten(0, -2).split(self.CHUNK_ROWS) for part in x)
        chunks = map(super().forward, zip(*rows, strict=True))
        return tuple(
            torch.cat(part).unflatten(0, x[0].shape[:-1]) for part in zip(*chunks, strict=True)
        )


class Folded(Scriptable, nn.Module):
    """Images (B, in_chans, H, W) to logits (B, num_classes), or what the network's head gives.

    Of standard layers and operations, for inference alone.

    Raises:
        ValueError: in `forward`, for images of a shape that the original refuses too.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.in_chans = model.in_chans
        self.num_classes, self.global_pool = model.num_classes, model.global_pool
        self.absolute = model.use_symmetrized_asym_feats
        self.head = copy.deepcopy(model.head)
