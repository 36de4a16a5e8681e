"""The table of layer checks: each variant of each layer, and the ordinary layer that does its job.

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
from deit.groups import FLOP, OCTIC, Group, Rep
from deit.verify.features import (
    MirroredTokens,
    in_columns,
    in_map,
    in_rows,
    picture,
    regular_tokens,
)
from deit.verify.measure import Feature

__all__ = ["LAYER_CASES", "LayerCase"]

WIDTH, WIDER, HEADS, PATCH = 32, 48, 2, 4
EVEN, ODD = (3, 4), (3, 5)  # height and width of the token grids
CHANNELS, EIGHT = FLOP.regular(WIDTH), OCTIC.regular(WIDTH)
COLOURS = Rep(FLOP, free=0, fixed=3)
EVEN_TOKENS, ODD_TOKENS = L.MirrorGrid(*EVEN).rep, L.MirrorGrid(*ODD).rep


@dataclass(frozen=True)
class LayerCase:
    """A layer to check.

    Attributes:
        name, variant: for the table.
        build: makes the layer, with any parameters.
        twin: makes the ordinary layer.
        before, after: how input and output transform.
        shape: (channels, height, width) of the maps that `arrange` turns into the layer's input;
            with three channels they are images.
        draws: whether the layer draws random numbers. It is checked in training mode then, from
            the same seed in each call.
    """

    name: str
    variant: str
    build: Callable[[], nn.Module]
    twin: Callable[[], nn.Module]
    before: Feature
    after: Feature
    shape: tuple[int, int, int] = (WIDTH, *EVEN)
    arrange: Callable[[Tensor], Tensor] = lambda x: x
    group: Group = FLOP
    draws: bool = False

    def __str__(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name


class Call(nn.Module):
    """A function of the input and of a module, as a module."""

    def __init__(self, function: Callable[[Tensor, Any], Tensor], module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.module)


class OrdinaryEmbedding(nn.Module):
    """A learned embedding of any form, (1, N, C)."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(1, tokens, WIDTH))

    def forward(self, batch: int) -> Tensor:
        return self.embedding.expand(batch, -1, -1)


def rows(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _tokens(grid: tuple[int, int], rep: Rep | None = CHANNELS, prefix: int = 0) -> Feature:
    return in_rows(rep, MirroredTokens(*grid, prefix))


def _pointwise(
    name: str,
    variant: str,
    build: Callable[[], nn.Module],
    twin: Callable[[], nn.Module],
    before: Feature | None = None,
    after: Feature | None = None,
    **options: Any,
) -> LayerCase:
    """A case on tokens (B, N, C), which keeps the kind of feature unless `after` is given."""
    before = before or _tokens(EVEN)
    return LayerCase(name, variant, build, twin, before, after or before,
                     **{"arrange": rows, **options})  # fmt: skip


def _octic(name: str, build: Callable[..., nn.Module], twin: Callable[[], nn.Module]) -> LayerCase:
    feature = in_rows(EIGHT)
    return _pointwise(name, "octic", partial(build, group=OCTIC), twin, feature, group=OCTIC)


def _on_packed_tokens(
    name: str, build: Callable[[Rep], nn.Module], twin: Callable[[], nn.Module]
) -> list[LayerCase]:
    """Cases on features whose token axis is decomposed too."""
    return [
        _pointwise(name, f"packed tokens, {kind}", partial(build, tokens), twin,
                   in_rows(CHANNELS, tokens), shape=(WIDTH, *grid))
        for kind, grid, tokens in (("even", EVEN, EVEN_TOKENS), ("odd", ODD, ODD_TOKENS))
    ]  # fmt: skip


def _linear() -> list[LayerCase]:
    twin, wider = partial(nn.Linear, WIDTH, WIDER), FLOP.regular(WIDER)
    build, after = partial(L.Linear, WIDTH, WIDER), _tokens(EVEN, wider)
    over_tokens = [
        _pointwise("Linear", f"over packed tokens, {kind}",
                   partial(L.Linear, tokens, tokens, across=CHANNELS),
                   partial(nn.Linear, tokens.size, tokens.size),
                   in_rows(tokens, CHANNELS), shape=(WIDTH, *grid),
                   arrange=partial(torch.flatten, start_dim=2))
        for kind, grid, tokens in (("even", EVEN, EVEN_TOKENS), ("odd", ODD, ODD_TOKENS))
    ]  # fmt: skip
    return [
        _pointwise("Linear", "", build, twin, after=after),
        _pointwise("Linear", "no bias", partial(build, bias=False), twin, after=after),
        _pointwise("Linear", "weights of a 1x1 convolution", partial(build, pointwise=True), twin,
                   in_columns(CHANNELS), in_columns(wider), arrange=last),
        _pointwise("Linear", "octic", partial(build, group=OCTIC), twin,
                   in_rows(EIGHT), in_rows(OCTIC.regular(WIDER)), group=OCTIC),
        *_on_packed_tokens("Linear", lambda t: L.Linear(CHANNELS, CHANNELS, across=t),
                           partial(nn.Linear, WIDTH, WIDTH)),
        *over_tokens,
    ]  # fmt: skip


def _entrywise() -> list[LayerCase]:
    affine, norm = partial(L.OrdinaryAffine, WIDTH), partial(nn.LayerNorm, WIDTH)

    def in_regular_basis(x: Tensor, scale: nn.Module) -> Tensor:
        return CHANNELS.from_regular(scale(CHANNELS.to_regular(x)))

    return [
        _pointwise("Affine", "", partial(L.Affine, WIDTH), affine),
        _octic("Affine", partial(L.Affine, WIDTH), affine),
        *_on_packed_tokens("Affine", lambda t: L.Affine(CHANNELS, across=t), affine),
        _pointwise("LayerScale", "", partial(L.LayerScale, WIDTH),
                   # any scale of packed channels is equivariant, one of ordinary channels is not
                   lambda: Call(in_regular_basis, affine())),
        _pointwise("LayerNorm", "", partial(L.LayerNorm, WIDTH), norm),
        _pointwise("LayerNorm", "channels last", partial(L.LayerNorm, WIDTH), norm,
                   in_columns(CHANNELS), arrange=last),
        _octic("LayerNorm", partial(L.LayerNorm, WIDTH), norm),
        _pointwise("GELU", "", partial(L.GELU, WIDTH), nn.GELU),
        _octic("GELU", partial(L.GELU, WIDTH), nn.GELU),
        *_on_packed_tokens("GELU", lambda t: L.GELU(CHANNELS, L.quick_gelu, across=t), nn.GELU),
        _pointwise("InvariantBridge", "", partial(L.InvariantBridge, WIDTH), nn.Identity,
                   after=_tokens(EVEN, None)),
        _pointwise("RegularBridge", "", partial(L.RegularBridge, WIDTH), nn.Identity,
                   after=regular_tokens(MirroredTokens(*EVEN))),
    ]  # fmt: skip


def _blocks() -> list[LayerCase]:
    attention, block = partial(L.Attention, WIDTH, HEADS), partial(L.Block, WIDTH, HEADS)
    ordinary_block = partial(L.OrdinaryBlock, WIDTH, HEADS)
    ordinary_attention = lambda: ordinary_block().attn  # noqa: E731
    mlp = partial(L.Mlp, WIDTH, 2 * WIDTH)
    odd = {"before": in_columns(CHANNELS), "shape": (WIDTH, *ODD), "arrange": last}
    drop = {"drop_path": 0.5}
    return [
        _pointwise("Mlp", "", mlp, lambda: ordinary_block().mlp),
        _octic("Mlp", mlp, lambda: ordinary_block().mlp),
        *_on_packed_tokens(
            "Mlp",
            lambda t: L.Mlp(CHANNELS, 2 * WIDTH, act=L.quick_gelu, across=t, prefix="lin"),
            lambda: ordinary_block().mlp,
        ),
        _pointwise("Attention", "fused", partial(attention, use_fused_attn=True),
                   ordinary_attention),
        _pointwise("Attention", "explicit", partial(attention, use_fused_attn=False),
                   ordinary_attention),
        _pointwise("Attention", "mixer", partial(attention, use_attn_mixer=True),
                   ordinary_attention),
        _octic("Attention", attention, ordinary_attention),
        _pointwise("Block", "fused", partial(block, use_fused_attn=True), ordinary_block),
        _pointwise("Block", "mixer", partial(block, use_attn_mixer=True), ordinary_block),
        _pointwise("Block", "stochastic depth", partial(block, **drop), ordinary_block, draws=True),
        _octic("Block", block, ordinary_block),
        *_on_packed_tokens("MixerBlock", lambda t: L.MixerBlock(CHANNELS, t),
                           ordinary_block),
        _pointwise("ConvBlock", "", partial(L.ConvBlock, WIDTH, 7),
                   partial(L.OrdinaryConvBlock, WIDTH, 7), **odd),
        _pointwise("ConvBlock", "LayerScale, stochastic depth",
                   partial(L.ConvBlock, WIDTH, 3, init_value=1.0, **drop),
                   partial(L.OrdinaryConvBlock, WIDTH, 3), **odd, draws=True),
    ]  # fmt: skip


def _image_to_tokens() -> list[LayerCase]:
    def order(grid: L.MirrorGrid, x: Tensor, _: nn.Module) -> Tensor:
        return grid.to_mirror_order(x)

    def row_major(x: Tensor, conv: nn.Module) -> Tensor:
        return rows(conv(x))

    # tokens are made small, so that the embeddings matter

    def embed(x: Tensor, positions: L.PositionEmbedding, grid: L.MirrorGrid) -> Tensor:
        return 0.1 * x + positions.packed(grid)

    def embed_anything(x: Tensor, embedding: OrdinaryEmbedding) -> Tensor:
        return 0.1 * x + embedding(x.shape[0])

    def prepend(x: Tensor, token: L.PrefixToken | OrdinaryEmbedding) -> Tensor:
        return torch.cat([token(x.shape[0]), 0.1 * x], 1)

    def patches(grid: tuple[int, int], **options: Any) -> LayerCase:
        size = (grid[0] * PATCH, grid[1] * PATCH)
        kind = "odd" if grid[1] % 2 else "even"
        return LayerCase(
            "PatchEmbed", f"{kind} grid", partial(L.PatchEmbed, size, PATCH, 3, WIDTH, **options),
            lambda: Call(row_major, nn.Conv2d(3, WIDTH, PATCH, PATCH)),
            picture(), _tokens(grid), shape=(3, *size),
        )  # fmt: skip

    def positions(variant: str, own: tuple[int, int], used: tuple[int, int]) -> LayerCase:
        grid = L.MirrorGrid(*used)
        return _pointwise(
            "PositionEmbedding", variant,
            lambda: Call(partial(embed, grid=grid), L.PositionEmbedding(WIDTH, L.MirrorGrid(*own))),
            lambda: Call(embed_anything, OrdinaryEmbedding(used[0] * used[1])),
            _tokens(used), shape=(WIDTH, *used),
        )  # fmt: skip

    grids = []
    for kind, size in (("even", EVEN), ("odd", ODD)):
        grid = L.MirrorGrid(*size)
        back = MirroredTokens(*size)
        grids += [
            LayerCase("MirrorGrid", f"to mirror order, {kind}",
                      lambda grid=grid: Call(lambda x, _: grid.to_mirror_order(x), nn.Identity()),
                      lambda: nn.Flatten(1, 2), in_columns(None), _tokens(size, None),
                      shape=(WIDTH, *size), arrange=last),
            LayerCase("MirrorGrid", f"to image order, {kind}",
                      lambda grid=grid: Call(lambda x, _: grid.to_image_order(x), nn.Identity()),
                      partial(nn.Unflatten, 1, size), in_rows(None, back), in_columns(None),
                      shape=(WIDTH, *size), arrange=rows),
        ]  # fmt: skip
    return [
        patches(EVEN),
        patches(ODD, scale=1.0),
        *grids,
        positions("even", EVEN, EVEN),
        positions("odd", ODD, ODD),
        positions("resampled", EVEN, (4, 5)),
        _pointwise("PrefixToken", "", lambda: Call(prepend, L.PrefixToken(WIDTH, 2)),
                   lambda: Call(prepend, OrdinaryEmbedding(2)), after=_tokens(EVEN, prefix=2)),
    ]  # fmt: skip


def _convolutions() -> list[LayerCase]:
    packed = in_map(CHANNELS)

    def case(name, variant, build, twin, before=packed, after=packed, shape=(WIDTH, *ODD), **more):
        return LayerCase(name, variant, build, twin, before, after, shape, **more)

    def columns(x: Tensor, conv: nn.Module) -> Tensor:
        return last(conv(x.permute(0, 3, 1, 2)))

    wider, halved = FLOP.regular(WIDER), (WIDTH, 4, 6)
    down = (CHANNELS, WIDER, (2, 2), (2, 2))
    depthwise = partial(nn.Conv2d, WIDTH, WIDTH, groups=WIDTH, padding="same")
    return [
        case("MirrorConv2d", "stem", partial(L.MirrorConv2d, COLOURS, WIDTH, (4, 4), (4, 4)),
             partial(nn.Conv2d, 3, WIDTH, 4, 4), picture(), packed, (3, 12, 20)),
        case("MirrorConv2d", "2x2 stride 2", partial(L.MirrorConv2d, *down),
             partial(nn.Conv2d, WIDTH, WIDER, 2, 2), after=in_map(wider), shape=halved),
        case("MirrorConv2d", "3x3, padded",
             partial(L.MirrorConv2d, CHANNELS, WIDTH, (3, 3), padding=(1, 1)),
             partial(nn.Conv2d, WIDTH, WIDTH, 3, padding=1)),
        case("ChannelsLastMirrorConv2d", "2x2 stride 2",
             partial(L.ChannelsLastMirrorConv2d, *down),
             lambda: Call(columns, nn.Conv2d(WIDTH, WIDER, 2, 2)),
             in_columns(CHANNELS), in_columns(wider), halved, arrange=last),
        case("MirrorDepthwiseConv2d", "7x7", partial(L.MirrorDepthwiseConv2d, WIDTH),
             partial(depthwise, kernel_size=7), shape=(WIDTH, 6, 9)),
        case("MirrorDepthwiseConv2d", "3x3, no bias, even width",
             partial(L.MirrorDepthwiseConv2d, WIDTH, 3, bias=False),
             partial(depthwise, kernel_size=3), shape=(WIDTH, *EVEN)),
    ]  # fmt: skip


LAYER_CASES = (
    *_linear(),
    *_entrywise(),
    *_blocks(),
    *_convolutions(),
    *_image_to_tokens(),
)
