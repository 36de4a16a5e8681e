"""The layer checks: each variant of each layer, and the ordinary layer that does its job.

The ordinary twin is what the same check must refuse. Grids are not square, so that height and width
cannot be confused, and of even and of odd width, because an odd one has a middle column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deit import layers as L
from deit.equivariance import Feature
from deit.groups import FLOP, OCTIC, Group, Rep
from deit.verify import samples
from deit.verify.check import Case
from deit.verify.rules import Rules

__all__ = ["LAYER_CASES", "LayerCase"]

WIDTH, WIDER, HEADS, PATCH = 32, 48, 2, 4
EVEN, ODD = (3, 4), (3, 5)  # height and width of the token grids
CHANNELS = FLOP.regular(WIDTH)
COLOURS = Rep(FLOP, free=0, fixed=3)
GRIDS = (("even", EVEN), ("odd", ODD))


@dataclass(frozen=True, eq=False)
class LayerCase(Case):
    """A layer, as a network of its own.

    Attributes:
        layer, twin: make the layer and the ordinary one, with any parameters.
        size: height and width of the input.
        kind: of input. "tokens" are parts (B, N, C/2); "maps" are parts (B, H, W, C/2), "image" is
            one of three colours.
        grid: of the tokens; the size unless it is given.
        prefix: number of tokens before the grid's.
        rows: the representation along decomposed tokens.
    """

    layer: Callable[[], nn.Module] = nn.Identity
    twin: Callable[[], nn.Module] = nn.Identity
    size: tuple[int, int] = EVEN
    kind: str = "tokens"
    grid: tuple[int, int] | None = None
    prefix: int = 0
    rows: Rep | None = None
    group: Group = FLOP

    def build(self) -> nn.Module:
        return self.layer()

    def build_twin(self) -> nn.Module:
        return self.twin()

    def rules(self, module: nn.Module) -> Rules:
        grid = (self.grid or self.size) if self.group is FLOP else None
        return Rules(module, self.group, grid, self.prefix, self.rows)

    def inputs(self, count: int, seed: int) -> Feature:
        if self.kind == "image":
            return samples.images(count, self.size, seed)
        x = samples.features(count, self.size, WIDTH, seed).permute(0, 2, 3, 1)
        x = x if self.kind == "maps" else x.flatten(1, 2)
        return tuple(self.group.regular(WIDTH).split(x))


class Call(nn.Module):
    """A function of the input and of a module, as a module."""

    def __init__(self, function: Callable[[Any, Any], Any], module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, x: Feature) -> Feature:
        return self.function(x, self.module)


class OrdinaryEmbedding(nn.Module):
    """A learned embedding of any form, (1, N, C)."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(1, tokens, WIDTH))

    def forward(self, batch: int) -> Tensor:
        return self.embedding.expand(batch, -1, -1)


def channels_last(conv: Callable[[], nn.Module], first: bool = False) -> Callable[[], nn.Module]:
    """An ordinary convolution with channels last; its input has them `first` if that is said."""

    def run(x: Tensor, module: nn.Module) -> Tensor:
        return module(x if first else x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    return lambda: Call(run, conv())


def octic(name: str, layer: Callable[..., nn.Module], twin: Callable[[], nn.Module]) -> LayerCase:
    return LayerCase(name, "octic", partial(layer, group=OCTIC), twin, group=OCTIC)


def decomposed(
    name: str, layer: Callable[[Rep], nn.Module], twin: Callable[[], nn.Module], more: str = ""
) -> list[LayerCase]:
    """Cases on features whose token axis is decomposed too."""
    return [
        LayerCase(name, f"decomposed tokens, {kind}{more}", partial(layer, L.MirrorGrid(*size).rep),
                  twin, size, rows=L.MirrorGrid(*size).rep)
        for kind, size in GRIDS
    ]  # fmt: skip


def _pointwise() -> list[LayerCase]:
    linear, twin = partial(L.Linear, WIDTH, WIDER), partial(nn.Linear, WIDTH, WIDER)
    affine, norm = partial(L.OrdinaryAffine, WIDTH), partial(nn.LayerNorm, WIDTH)
    own_norm = partial(L.LayerNorm, WIDTH)

    def in_regular_basis(x: Tensor, scale: nn.Module) -> Tensor:
        return CHANNELS.from_regular(scale(CHANNELS.to_regular(x)))

    return [
        LayerCase("Linear", "", linear, twin),
        LayerCase("Linear", "no bias", partial(linear, bias=False), twin),
        LayerCase("Linear", "weights of a 1x1 convolution", partial(linear, pointwise=True), twin,
                  kind="maps"),
        octic("Linear", linear, twin),
        LayerCase("Affine", "", partial(L.Affine, WIDTH), affine),
        octic("Affine", partial(L.Affine, WIDTH), affine),
        *decomposed("Affine", lambda rows: L.Affine(CHANNELS, across=rows), affine),
        # any scale of parts is equivariant, one of ordinary channels is not
        LayerCase("LayerScale", "", partial(L.LayerScale, WIDTH),
                  lambda: Call(in_regular_basis, affine())),
        LayerCase("LayerNorm", "", own_norm, norm),
        LayerCase("LayerNorm", "channels last", own_norm, norm, kind="maps"),
        octic("LayerNorm", own_norm, norm),
        LayerCase("GELU", "", partial(L.GELU, WIDTH), nn.GELU),
        LayerCase("GELU", "quick, scaled", partial(L.GELU, WIDTH, L.quick_gelu, scale=2**0.5),
                  nn.GELU),
        octic("GELU", partial(L.GELU, WIDTH), nn.GELU),
        LayerCase("InvariantBridge", "", partial(L.InvariantBridge, WIDTH), nn.Identity),
        LayerCase("RegularBridge", "", partial(L.RegularBridge, WIDTH), nn.Identity),
    ]  # fmt: skip


def _blocks() -> list[LayerCase]:
    attention, block = partial(L.Attention, WIDTH, HEADS), partial(L.Block, WIDTH, HEADS)
    twin, mlp = partial(L.OrdinaryBlock, WIDTH, HEADS), partial(L.Mlp, WIDTH, 2 * WIDTH)
    drop, odd = {"drop_path": 0.5}, {"kind": "maps", "size": ODD}
    plain, fused, mixer = (
        {"use_fused_attn": False},
        {"use_fused_attn": True},
        {"use_attn_mixer": True},
    )
    return [
        LayerCase("Mlp", "", mlp, lambda: twin().mlp),
        octic("Mlp", mlp, lambda: twin().mlp),
        LayerCase("Attention", "fused", partial(attention, **fused), lambda: twin().attn),
        LayerCase("Attention", "explicit", partial(attention, **plain), lambda: twin().attn),
        LayerCase("Attention", "mixer", partial(attention, **mixer), lambda: twin().attn),
        octic("Attention", attention, lambda: twin().attn),
        LayerCase("Block", "fused", partial(block, **fused), twin),
        LayerCase("Block", "mixer", partial(block, **mixer), twin),
        LayerCase("Block", "stochastic depth", partial(block, **drop), twin),
        octic("Block", block, twin),
        *decomposed("MixerBlock", lambda rows: L.MixerBlock(CHANNELS, rows), twin),
        *decomposed("MixerBlock", lambda rows: L.MixerBlock(CHANNELS, rows, **drop), twin,
                    ", stochastic depth"),
        LayerCase("ConvBlock", "", partial(L.ConvBlock, WIDTH, 7),
                  partial(L.OrdinaryConvBlock, WIDTH, 7), **odd),
        LayerCase("ConvBlock", "LayerScale, stochastic depth",
                  partial(L.ConvBlock, WIDTH, 3, init_value=1.0, **drop),
                  partial(L.OrdinaryConvBlock, WIDTH, 3), **odd),
    ]  # fmt: skip


def _convolutions() -> list[LayerCase]:
    conv, maps = partial(L.MirrorConv2d, CHANNELS), {"kind": "maps"}
    depthwise = partial(nn.Conv2d, WIDTH, WIDTH, groups=WIDTH, padding="same")
    return [
        LayerCase("MirrorConv2d", "stem", partial(L.MirrorConv2d, COLOURS, WIDTH, (4, 4), (4, 4)),
                  channels_last(partial(nn.Conv2d, 3, WIDTH, 4, 4), first=True), (12, 20), "image"),
        LayerCase("MirrorConv2d", "2x2 stride 2", partial(conv, WIDER, (2, 2), (2, 2)),
                  channels_last(partial(nn.Conv2d, WIDTH, WIDER, 2, 2)), (4, 6), **maps),
        LayerCase("MirrorConv2d", "3x3, padded", partial(conv, WIDTH, (3, 3), padding=(1, 1)),
                  channels_last(partial(nn.Conv2d, WIDTH, WIDTH, 3, padding=1)), ODD, **maps),
        LayerCase("MirrorDepthwiseConv2d", "7x7", partial(L.MirrorDepthwiseConv2d, WIDTH),
                  channels_last(partial(depthwise, kernel_size=7)), (6, 9), **maps),
        LayerCase("MirrorDepthwiseConv2d", "3x3, no bias, even width",
                  partial(L.MirrorDepthwiseConv2d, WIDTH, 3, bias=False),
                  channels_last(partial(depthwise, kernel_size=3)), **maps),
    ]  # fmt: skip


def _tokens() -> list[LayerCase]:
    # tokens are made small, so that the embeddings matter

    def embed(x: Feature, positions: L.PositionEmbedding, grid: L.MirrorGrid) -> Feature:
        return tuple(0.1 * part + own for part, own in zip(x, positions(grid), strict=True))

    def embed_anything(x: Tensor, embedding: OrdinaryEmbedding) -> Tensor:
        return 0.1 * x + embedding(x.shape[0])

    def prepend(x: Feature, token: L.PrefixToken) -> Feature:
        own = token(x[0].shape[0])
        return tuple(torch.cat([t, 0.1 * part], 1) for t, part in zip(own, x, strict=True))

    def prepend_anything(x: Tensor, token: OrdinaryEmbedding) -> Tensor:
        return torch.cat([token(x.shape[0]), 0.1 * x], 1)

    def row_major(x: Tensor, conv: nn.Module) -> Tensor:
        return conv(x).flatten(2).mT

    def patches(grid: tuple[int, int], variant: str, **options: Any) -> LayerCase:
        size = (grid[0] * PATCH, grid[1] * PATCH)
        return LayerCase(
            "PatchEmbed", variant, partial(L.PatchEmbed, size, PATCH, 3, WIDTH, **options),
            lambda: Call(row_major, nn.Conv2d(3, WIDTH, PATCH, PATCH)), size, "image", grid,
        )  # fmt: skip

    def positions(variant: str, own: tuple[int, int], used: tuple[int, int]) -> LayerCase:
        layer = partial(embed, grid=L.MirrorGrid(*used))
        return LayerCase(
            "PositionEmbedding", variant,
            lambda: Call(layer, L.PositionEmbedding(WIDTH, L.MirrorGrid(*own))),
            lambda: Call(embed_anything, OrdinaryEmbedding(used[0] * used[1])), used,
        )  # fmt: skip

    def order(variant: str, size: tuple[int, int]) -> list[LayerCase]:
        grid = L.MirrorGrid(*size)

        def call(change: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
            return lambda: Call(lambda x, _: tuple(map(change, x)), nn.Identity())

        return [
            LayerCase("MirrorGrid", f"to mirror order, {variant}", call(grid.to_mirror_order),
                      lambda: nn.Flatten(1, 2), size, "maps"),
            LayerCase("MirrorGrid", f"to image order, {variant}", call(grid.to_image_order),
                      partial(nn.Unflatten, 1, size), size),
        ]  # fmt: skip

    return [
        patches(EVEN, "even grid"),
        patches(ODD, "odd grid", scale=1.0),
        *(case for variant, size in GRIDS for case in order(variant, size)),
        positions("even", EVEN, EVEN),
        positions("odd", ODD, ODD),
        positions("resampled", EVEN, (4, 5)),
        LayerCase("PrefixToken", "", lambda: Call(prepend, L.PrefixToken(WIDTH, 2)),
                  lambda: Call(prepend_anything, OrdinaryEmbedding(2)), prefix=2),
    ]  # fmt: skip


LAYER_CASES = (*_pointwise(), *_blocks(), *_convolutions(), *_tokens())
