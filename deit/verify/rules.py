"""The rule of each layer: how the group acts on what goes into it, and on what comes out of it.

The form of a feature says most of it. A tuple of parts is equivariant: the group acts on part rho
by irrep rho, for flopping (s, -a), and moves its places. One tensor is an image, or invariant. The
rules here are the exceptions, and what flopping does to places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deit import layers as L
from deit.equivariance import (
    Action,
    Feature,
    as_parts,
    channels,
    compose,
    image,
    invariant,
    tokens,
)
from deit.groups import FLOP, Group, Rep

INTO, OUT_OF = "into", "out of"


@dataclass(frozen=True)
class Rule:
    """How the group acts on a feature, and which pieces of it depend on the image.

    A `constant` one does not: a position embedding, a kernel.
    """

    act: Action
    pieces: Callable[[Any], tuple[Tensor, ...]] = as_parts
    constant: bool = False


def swap(x: Tensor, count: int, dim: int = 1, prefix: int = 0, sign: int = 1) -> Tensor:
    """Along `dim`, `count` entries behind the prefix change places with the last ones.

    That is how flopping moves places in mirror order. Those between get a sign.
    """
    middle = x.shape[dim] - prefix - 2 * count
    before, left, centre, right = x.split([prefix, count, middle, count], dim)
    return torch.cat([before, right, sign * centre, left], dim)


def on_parts(group: Group) -> Action:
    """On the last axis of parts, by their irreps."""

    def act(g: int, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        free = x[-1].shape[-1] // group.irreps[-1].dim ** 2
        return Rep(group, free, x[0].shape[-1] - free).act_on_parts(g, x)

    return act


def on_places(rows: Rep) -> Action:
    """On parts whose rows are places [l | m | r]: l and r are exchanged, m of a is negated."""
    return lambda g, x: (swap(x[0], rows.free), swap(x[1], rows.free, sign=-1)) if g else x


def decomposed(rows: Rep) -> Rule:
    """Parts (B, N, C/2) whose tokens are decomposed too, symmetric ones first: ss, sa, as, aa."""
    act = compose(on_parts(FLOP), tokens(lambda part: rows.act(1, part, 1)))
    return Rule(act, lambda x: tuple(piece for part in x for piece in rows.split(part, 1)))


def packed_map(symmetric: int, x: Tensor) -> Rule:
    """Maps (B, C, H, W) as networks hand them out: flipped, channels behind the first negated."""
    rep = Rep(FLOP, x.shape[1] - symmetric, 2 * symmetric - x.shape[1])
    return Rule(compose(channels(rep, 1), image(FLOP)), lambda y: tuple(rep.split(y, 1)))


class Rules:
    """The rules for the layers of one network, or for one layer.

    Args:
        network: itself a layer, or a network that takes images.
        size: height and width of the images, or of the token grid where there is no patch
            embedding.
        group: only flopping moves tokens.
    """

    def __init__(self, network: nn.Module, size: tuple[int, int], group: Group = FLOP) -> None:
        self.network, self.group = network, group
        patches = getattr(network, "patch_embed", network)
        is_cut = isinstance(patches, L.PatchEmbed)
        self.grid = L.MirrorGrid(*(patches.dynamic_feat_size(size) if is_cut else size))
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
                halves = Rule(tokens(lambda part: swap(part, part.shape[1] // 2)))
                self._own |= dict.fromkeys(m.attn.modules(), halves)
                self._own |= dict.fromkeys(m.mlp.modules(), Rule(on_places(m.tokens)))
            elif isinstance(m, L.Linear):
                # its blocks see single parts: the layer around them is measured
                inner = (each for block in m.blocks() for each in block.modules())
                self._own |= dict.fromkeys(inner)
            elif isinstance(m, L.MirrorKernel):
                self._own[m] = Rule(
                    lambda g, kernel, sign=m.sign: sign * kernel.flip(-1) if g else kernel,
                    constant=True,
                )

    def rule(self, module: nn.Module, side: str, x: Feature) -> Rule | None:
        """How the input (INTO) or the output (OUT_OF) transforms; None if nothing is promised."""
        if module in self._own:
            return self._own[module]
        places = self._places(as_parts(x)[0])
        if isinstance(x, tuple):
            if self.rows is not None and not isinstance(module, L.PatchEmbed):
                return decomposed(self.rows)
            constant = isinstance(module, (L.PositionEmbedding, L.PrefixToken))
            return Rule(compose(on_parts(self.group), places), constant=constant)
        if side == INTO and (module is self.network or isinstance(module, L.MirrorConv2d)):
            return Rule(image(FLOP))
        if self.rows is not None:  # invariant entries of decomposed tokens have no place
            places = invariant
        if isinstance(module, L.RegularBridge):
            exchange = tokens(lambda part: swap(part, part.shape[-1] // 2, -1))
            return Rule(compose(exchange, places))
        ordinary = any(True for _ in module.parameters())
        if isinstance(module, L.InvariantBridge) or (self.invariant and ordinary):
            return Rule(places)
        return None

    def _places(self, x: Tensor) -> Action:
        """On the places of maps (B, H, W, C) or of tokens (B, N, C) behind their prefix."""
        if self.group is not FLOP or x.ndim == 2:  # pooled features have none
            return invariant
        if x.ndim == 4:
            return tokens(lambda part: part.flip(2))
        prefix = x.shape[1] - self.grid.rep.size
        if prefix not in (0, self.prefix):  # prefix tokens alone
            return invariant
        return tokens(lambda part: swap(part, self.grid.rep.free, prefix=prefix))
