"""How flopping acts on tensors of the layouts that occur in networks.

The token swap is written out here once more rather than taken from `deit.layers`, so that an error
in the layers' own token order cannot cancel against the same error in the check.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deit.equivariance import Action, channels, compose, image, invariant, tokens
from deit.groups import FLOP, Rep
from deit.verify.measure import Feature

__all__ = [
    "MirroredTokens",
    "in_columns",
    "in_map",
    "in_rows",
    "nowhere",
    "picture",
    "regular_tokens",
]

Parts = Callable[[Tensor], list[Tensor]]


class MirroredTokens:
    """Tokens (B, prefix + N, ...) of a grid in mirror order: the left half row by row, then the
    middle column, then the right half mirrored."""

    def __init__(self, height: int, width: int, prefix: int = 0) -> None:
        left, middle = height * (width // 2), height * (width % 2)
        order = torch.arange(prefix + height * width)
        start, middle_start = prefix, prefix + left
        right_start = middle_start + middle
        self.order = torch.cat(
            [
                order[:start],
                order[right_start:],
                order[middle_start:right_start],
                order[start:middle_start],
            ]
        )

    def swap(self, x: Tensor) -> Tensor:
        """Exchange mirror images along axis 1."""
        if x.shape[1] != len(self.order):
            raise ValueError(f"{x.shape[1]} tokens, expected {len(self.order)}")
        return x[:, self.order.to(x.device)]


def split(rep: Rep | None, dim: int) -> Parts:
    """The parts of the irreps that occur; without a representation there is one part."""
    if rep is None:
        return lambda x: [x]
    return lambda x: [part for part in rep.split(x, dim) if part.shape[dim]]


def _channels(rep: Rep | None, dim: int = -1) -> Action:
    return invariant if rep is None else channels(rep, dim)


def picture() -> Feature:
    """Images (B, colours, H, W)."""
    return Feature(image(FLOP))


def in_map(rep: Rep | None) -> Feature:
    """Channels first, (B, C, H, W)."""
    return Feature(compose(_channels(rep, 1), image(FLOP)), split(rep, 1))


def in_columns(rep: Rep | None) -> Feature:
    """Channels last, (B, H, W, C)."""
    flip = tokens(lambda x: x.flip(2))
    return Feature(compose(_channels(rep), flip), split(rep, -1))


def in_rows(rep: Rep | None, place: MirroredTokens | Rep | None = None) -> Feature:
    """Tokens (B, N, C) or features (B, C) with packed channels, or invariant ones without `rep`.

    `place` says what flopping does to the axis before the last: exchange tokens, act by another
    representation, or nothing.
    """
    if isinstance(place, Rep):
        inner = split(place, -2)
        outer = split(rep, -1)
        return Feature(
            compose(_channels(rep), channels(place, -2)),
            lambda x: [part for row in inner(x) for part in outer(row)],
        )
    move = invariant if place is None else tokens(place.swap)
    return Feature(compose(_channels(rep), move), split(rep, -1))


def nowhere(rep: Rep) -> Feature:
    """Learned tokens (B, count, C) that belong to no place and depend on no image."""
    return Feature(channels(rep), constant=True)


def regular_tokens(place: MirroredTokens | None) -> Feature:
    """Tokens (B, N, C) in the regular basis: flopping exchanges the halves of the channels."""

    def exchange(g: int, x: Tensor) -> Tensor:
        return torch.cat(x.chunk(2, -1)[::-1], -1) if g else x

    return Feature(compose(exchange, invariant if place is None else tokens(place.swap)))
