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


@dataclass(frozen=True)
class Rule:
    """How the group acts on a feature, and which pieces of it depend on the image.

    A `constant` one does not: a position embedding, a kernel.
    """

    act: Action
    pieces: Callable[[Any], tuple[Tensor, ...]] = as_parts
    constant: bool = False


def swap(height: int, width: int, prefix: int = 0) -> Action:
    """Exchange mirror images among tokens (B, prefix + N, ...) of a grid in mirror order: the left
    half row by row, then the middle column, then the right half mirrored."""
    half, middle = height * (width // 2), height * (width % 2)

    def mirror(x: Tensor) -> Tensor:
        before, left, centre, right = x.split([prefix, half, middle, half], 1)
        return torch.cat([before, right, centre, left], 1)

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

    def act(g: int, x: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        if not g:
            return x
        pieces = [part.split([rows.free, rows.fixed, rows.free], 1) for part in x]
        return tuple(
            torch.cat([right, sign * middle, left], 1)
            for sign, (left, middle, right) in zip((1, -1), pieces, strict=True)
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
        grid: height and width of the token grid. Where there is a patch embedding it follows from
            the images.
        group: only flopping moves tokens.
    """

    def __init__(self, network: nn.Module, grid: tuple[int, int], group: Group = FLOP) -> None:
        self.network, self.grid, self.group = network, grid, group
        self.prefix = getattr(network, "num_prefix_tokens", 0)
        # how flopping acts along tokens that are decomposed, as in ResMLP
        self.rows = getattr(network, "tokens", getattr(network, "across", None))
        # Nothing is promised behind a bridge to the regular basis. Without one, logits and what
        # ordinary layers see are invariant.
        self.invariant = not any(isinstance(m, L.RegularBridge) for m in network.modules())
        self._own: dict[nn.Module, Rule | None] = {}
        for m in network.modules():  # those outside first
            if isinstance(m, L.MixerBlock):
                # these work on sums and differences, which flopping exchanges
                self._own |= dict.fromkeys(m.attn.modules(), Rule(exchange(1)))
                self._own |= dict.fromkeys(m.mlp.modules(), Rule(exchange_places(m.tokens)))
            elif isinstance(m, L.Linear):
                # its blocks see single parts: the layer around them is measured
                inner = (each for block in m.blocks() for each in block.modules())
                self._own |= dict.fromkeys(inner)
            elif isinstance(m, L.MirrorKernel):
                self._own[m] = Rule(
                    lambda g, kernel, sign=m.sign: sign * kernel.flip(-1) if g else kernel,
                    constant=True,
                )

    def promises(self, module: nn.Module) -> bool:
        """Whether anything is promised of a layer that has parameters."""
        if self._own.get(module, True) is None:
            return False
        return self.invariant or not isinstance(module, ORDINARY)

    def rule(self, module: nn.Module, side: str, x: Feature) -> Rule | None:
        """How the input (INTO) or the output (OUT_OF) transforms; None if nothing is promised."""
        if module in self._own:
            return self._own[module]
        if isinstance(x, tuple):
            if len(x) != len(self.group.irreps):
                return None
            if self.rows is not None and not isinstance(module, L.PatchEmbed):
                return decomposed(self.rows)
            constant = isinstance(module, (L.PositionEmbedding, L.PrefixToken))
            return Rule(compose(on_parts(self.group), self._places(module, x)), constant=constant)
        if side == INTO and module is self.network and x.ndim == 4:
            patches = getattr(module, "patch_embed", module)
            if isinstance(patches, L.PatchEmbed):
                self.grid = patches.dynamic_feat_size(tuple(x.shape[-2:]))
            return Rule(image(FLOP))
        if side == INTO and isinstance(module, L.MirrorConv2d):
            return Rule(image(FLOP))
        places = self._places(module, x)
        if isinstance(module, L.RegularBridge):
            return Rule(compose(exchange(-1), places))
        ordinary = module is self.network or isinstance(module, ORDINARY)
        if isinstance(module, L.InvariantBridge) or (self.invariant and ordinary):
            return Rule(places)
        return None

    def _places(self, module: nn.Module, x: Feature) -> Action:
        first = as_parts(x)[0]
        if first.ndim == 4:  # (B, H, W, C)
            return tokens(lambda part: part.flip(2))
        of_patches = isinstance(module, (L.PatchEmbed, L.PositionEmbedding))
        prefix = 0 if of_patches else self.prefix
        # pooled features, class tokens, and invariant entries of decomposed tokens have no place
        if self.group is not FLOP or first.ndim == 2 or first.shape[1] <= prefix:
            return invariant
        if self.rows is not None and not of_patches:
            return invariant
        height, width = self.grid
        return swap(height, width, 0 if first.shape[1] == height * width else prefix)
