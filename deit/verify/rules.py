"""The rule of each layer: how the group acts on what goes into it, and on what comes out of it.

The form of a feature says most of it. A tuple of parts is equivariant: the group acts on part rho
by irrep rho, for flopping (s, -a), and moves its places. One tensor is an image, or invariant. The
rules here are the exceptions, and what flopping does to places.

The token order is written out here once more rather than taken from `deit.layers`, so that an error
in the layers' own order cannot cancel against the same error in the check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Mlp as OrdinaryMlp
from timm.models.vision_transformer import Attention as OrdinaryAttention
from torch import Tensor, nn

from deit import layers as L
from deit.equivariance import Action, Feature, as_parts, compose, image, invariant, tokens
from deit.groups import FLOP, Group, Rep

__all__ = ["INTO", "OUT_OF", "Rule", "Rules", "decomposed", "is_feature", "packed_map", "swap"]

INTO, OUT_OF = "into", "out of"
# Ordinary layers: a network that is invariant to its end uses them on invariant features alone.
ORDINARY = (
    nn.Linear,
    nn.LayerNorm,
    L.OrdinaryAffine,
    L.OrdinaryBlock,
    OrdinaryAttention,
    OrdinaryMlp,
)
EMBEDDINGS = (L.PositionEmbedding, L.PrefixToken)


@dataclass(frozen=True)
class Rule:
    """How the group acts on a feature, and which pieces of it depend on the image.

    A `constant` one does not: a position embedding, a kernel.
    """

    act: Action
    pieces: Callable[[Any], tuple[Tensor, ...]] = as_parts
    constant: bool = False


def is_feature(x: Any) -> bool:
    """A tensor, or a tuple of them."""
    return isinstance(x, Tensor) or (
        isinstance(x, tuple) and len(x) > 0 and all(isinstance(part, Tensor) for part in x)
    )


def swap(height: int, width: int, prefix: int = 0) -> Action:
    """Exchange mirror images among tokens (B, prefix + N, ...) of a grid in mirror order: the left
    half row by row, then the middle column, then the right half mirrored."""
    left, middle = height * (width // 2), height * (width % 2)
    start, end = torch.arange(prefix), prefix + height * width
    order = torch.cat(
        [
            start,
            torch.arange(prefix + left + middle, end),
            torch.arange(prefix + left, prefix + left + middle),
            torch.arange(prefix, prefix + left),
        ]
    )

    def mirror(x: Tensor) -> Tensor:
        if x.shape[1] != len(order):
            raise ValueError(f"{x.shape[1]} tokens, expected {len(order)}")
        return x[:, order.to(x.device)]

    return tokens(mirror)


def on_parts(group: Group) -> Action:
    """On the last axis of parts, by their irreps."""

    def act(g: int, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        free = x[-1].shape[-1] // group.irreps[-1].dim ** 2
        return Rep(group, free, x[0].shape[-1] - free).act_on_parts(g, x)

    return act


def exchange(dim: int) -> Action:
    """Flopping exchanges the two halves along `dim`, of every part."""
    return tokens(lambda x: torch.cat(x.chunk(2, dim)[::-1], dim))


def exchange_places(rows: Rep) -> Action:
    """On parts whose rows are places [l | m | r]: l and r are exchanged, m of a is negated."""
    sizes = [rows.free, rows.fixed, rows.free]

    def act(g: int, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if not g:
            return x
        (s_left, s_middle, s_right), (a_left, a_middle, a_right) = (p.split(sizes, 1) for p in x)
        return (
            torch.cat([s_right, s_middle, s_left], 1),
            torch.cat([a_right, -a_middle, a_left], 1),
        )

    return act


def decomposed(rows: Rep) -> Rule:
    """Parts (B, N, C/2) whose tokens are decomposed too, symmetric ones first: ss, sa, as, aa."""
    act = compose(on_parts(FLOP), tokens(lambda part: rows.act(1, part, 1)))
    return Rule(act, lambda x: tuple(piece for part in x for piece in rows.split(part, 1)))


def packed_map(symmetric: int) -> Rule:
    """Maps (B, C, H, W) as networks hand them out: flipped, channels behind the first negated."""

    def split(x: Tensor) -> tuple[Tensor, ...]:
        return x[:, :symmetric], x[:, symmetric:]

    def act(g: int, x: Tensor) -> Tensor:
        s, a = split(x)
        return torch.cat([s, -a], 1).flip(-1) if g else x

    return Rule(act, split)


class Rules:
    """The rules for the layers of one network, or for one layer.

    Args:
        network: itself a layer, or a network that takes images.
        grid: height and width of the token grid; None if nothing moves tokens. A network with a
            patch embedding sets it itself.
        prefix: number of tokens before those of the grid.
        rows: the representation along decomposed tokens, as in ResMLP.

    Attributes:
        invariant: nothing is promised behind a bridge to the regular basis; without one, logits
            and what ordinary layers see are invariant.
    """

    def __init__(
        self,
        network: nn.Module,
        group: Group = FLOP,
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
        rows: Rep | None = None,
    ) -> None:
        self.network, self.group, self.grid = network, group, grid
        self.prefix = getattr(network, "num_prefix_tokens", prefix)
        self.rows = getattr(network, "tokens", None) if rows is None else rows
        modules = list(network.modules())
        self.invariant = not any(isinstance(m, L.RegularBridge) for m in modules)
        # the blocks of equivariant linear maps see single parts: the layer around them is measured
        self._inner = {
            inner
            for m in modules
            if isinstance(m, L.Linear)
            for inner in m.modules()
            if inner is not m
        }
        # and these work on sums and differences, which flopping exchanges; see MixerBlock
        self._mixed = {
            inner: Rule(action)
            for m in modules
            if isinstance(m, L.MixerBlock)
            for mixed, action in ((m.attn, exchange(1)), (m.mlp, exchange_places(m.tokens)))
            for inner in mixed.modules()
        }

    def promises(self, module: nn.Module) -> bool:
        """Whether anything is promised of a layer that has parameters."""
        return module not in self._inner and (self.invariant or not isinstance(module, ORDINARY))

    def rule(self, module: nn.Module, side: str, x: Feature) -> Rule | None:
        """How the input (INTO) or the output (OUT_OF) transforms; None if nothing is promised."""
        if module in self._inner:
            return None
        if isinstance(module, L.MirrorKernel):
            act = lambda g, kernel: module.sign * kernel.flip(-1) if g else kernel  # noqa: E731
            return Rule(act, constant=True)
        if isinstance(x, tuple):
            return self._parts(module, side, x)
        if side == INTO:
            if module is self.network and x.ndim == 4:
                self._locate(x)
                return Rule(image(FLOP))
            if isinstance(module, L.MirrorConv2d):
                return Rule(image(FLOP))
        if isinstance(module, L.RegularBridge):
            return Rule(compose(exchange(-1), self._places(module, x)))
        if isinstance(module, L.InvariantBridge):
            return Rule(self._places(module, x))
        if self.invariant and (module is self.network or isinstance(module, ORDINARY)):
            return Rule(self._places(module, x))
        return None

    def _parts(self, module: nn.Module, side: str, x: tuple[Tensor, ...]) -> Rule | None:
        if len(x) != len(self.group.irreps):
            return None
        if module in self._mixed:
            return self._mixed[module]
        if self.rows is not None and not isinstance(module, L.PatchEmbed):
            return decomposed(self.rows)
        constant = isinstance(module, EMBEDDINGS)
        return Rule(compose(on_parts(self.group), self._places(module, x)), constant=constant)

    def _locate(self, images: Tensor) -> None:
        if (patches := getattr(self.network, "patch_embed", None)) is not None:
            grid = patches.grid_for(images.shape[-2], images.shape[-1])
            self.grid = (grid.height, grid.width)

    def _places(self, module: nn.Module, x: Feature) -> Action:
        first = as_parts(x)[0]
        if first.ndim == 4:  # (B, H, W, C)
            return tokens(lambda part: part.flip(2))
        of_patches = isinstance(module, (L.PatchEmbed, L.PositionEmbedding))
        prefix = 0 if of_patches else self.prefix
        # pooled features, class tokens, and invariant entries of decomposed tokens have no place
        if self.grid is None or first.ndim == 2 or first.shape[1] <= prefix:
            return invariant
        if self.rows is not None and not of_patches:
            return invariant
        height, width = self.grid
        return swap(height, width, 0 if first.shape[1] == height * width else prefix)
