"""The layer checks: each variant of each layer, and the ordinary layer that does its job.

The ordinary twin is what the same check must refuse. Grids are not square, so that height and width
cannot be confused, and of even and of odd width, because an odd one has a middle column.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import Permute

from deit import layers as L
from deit.equivariance import Feature, map_parts
from deit.groups import FLOP, OCTIC, Rep
from deit.verify.check import Case
from deit.verify.samples import WIDTH

WIDER, HEADS, PATCH = 48, 2, 4
EVEN, ODD = (3, 4), (3, 5)  # height and width of the token grids
GRIDS = [(kind, size, L.MirrorGrid(*size)) for kind, size in (("even", EVEN), ("odd", ODD))]
CHANNELS = FLOP.regular(WIDTH)
COLOURS = Rep(FLOP, free=0, fixed=3)
Build = Callable[..., Any]  # makes a module


def case(
    layer: Build,
    variant: str,
    twin: Build,
    *args: Any,
    name: str = "",
    size: tuple[int, int] = EVEN,
    form: str = "tokens",
    **options: Any,
) -> Case:
    """`layer(*args, **options)`, checked as a network of one layer; `name` it if it is a function.

    `size` is also that of the token grid, unless the layer makes that.
    """
    group, build = options.get("group", FLOP), partial(layer, *args, **options)
    return Case(name or layer.__name__, variant, build, twin, size, form, group)


class Call(nn.Module):
    """A function of the input and of a module, as a module."""

    def __init__(self, function: Callable[[Any, Any], Any], module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module
        self.num_prefix_tokens = 2 if isinstance(module, L.PrefixToken) else 0

    def forward(self, x: Feature) -> Feature:
        return self.function(x, self.module)


def channels_last(*args: Any, **options: Any) -> Build:
    """An ordinary convolution with channels last."""
    conv = partial(nn.Conv2d, *args, **options)
    return lambda: nn.Sequential(Permute([0, 3, 1, 2]), conv(), Permute([0, 2, 3, 1]))


def stem() -> nn.Module:
    """The same of an image."""
    return nn.Sequential(nn.Conv2d(3, WIDTH, PATCH, PATCH), Permute([0, 2, 3, 1]))


def learned(tokens: int, add: Callable[[Tensor, Tensor], Tensor]) -> Build:
    """An ordinary embedding (1, N, C), and how tokens and it make the output."""
    return lambda: Call(
        lambda x, own: add(x, own[0]), nn.ParameterList([torch.empty(1, tokens, WIDTH)])
    )


def prepended(x: Tensor, token: Tensor) -> Tensor:
    """Tokens are made small, so that the embeddings matter."""
    return torch.cat([token.expand(len(x), -1, -1), 0.1 * x], 1)


def prefix() -> nn.Module:
    """Class tokens in front of a feature."""
    token = L.PrefixToken(WIDTH, 2)
    return Call(lambda x, own: tuple(map(prepended, x, own(len(x[0])))), token)


def positions(own: tuple[int, int], used: tuple[int, int]) -> nn.Module:
    """A position embedding of one grid, added to a feature of another."""

    def embed(x: Feature, embedding: L.PositionEmbedding) -> Feature:
        added = embedding(L.MirrorGrid(*used))
        return tuple(0.1 * part + each for part, each in zip(x, added, strict=True))

    return Call(embed, L.PositionEmbedding(WIDTH, L.MirrorGrid(*own)))


def order(change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A change of the order of tokens, of each part."""
    return Call(lambda x, _: map_parts(change, x), nn.Identity())


dense, norm = partial(nn.Linear, WIDTH, WIDER), partial(nn.LayerNorm, WIDTH)
affine, block = partial(L.OrdinaryAffine, WIDTH), partial(L.OrdinaryBlock, WIDTH, HEADS)
depthwise = partial(channels_last, WIDTH, WIDTH, groups=WIDTH, padding="same")

LAYER_CASES = (
    case(L.Linear, "", dense, WIDTH, WIDER),
    case(L.Linear, "no bias", dense, WIDTH, WIDER, bias=False),
    case(L.Linear, "weights of a 1x1 convolution", dense, WIDTH, WIDER, pointwise=True,
         form="maps"),
    case(L.Linear, "octic", dense, WIDTH, WIDER, group=OCTIC),
    case(L.Affine, "", affine, WIDTH),
    case(L.Affine, "octic", affine, WIDTH, group=OCTIC),
    *(case(L.Affine, f"decomposed tokens, {kind}", affine, CHANNELS, across=grid.rep, size=size)
      for kind, size, grid in GRIDS),
    # any scale of parts is equivariant, one of ordinary channels is not
    case(L.LayerScale, "", lambda: Call(
        lambda x, scale: CHANNELS.from_regular(scale(CHANNELS.to_regular(x))), affine()), WIDTH),
    case(L.LayerNorm, "", norm, WIDTH),
    case(L.LayerNorm, "channels last", norm, WIDTH, form="maps"),
    case(L.LayerNorm, "octic", norm, WIDTH, group=OCTIC),
    case(L.GELU, "", nn.GELU, WIDTH),
    case(L.GELU, "quick, scaled", nn.GELU, WIDTH, L.quick_gelu, scale=2**0.5),
    case(L.GELU, "octic", nn.GELU, WIDTH, group=OCTIC),
    case(L.InvariantBridge, "", nn.Identity, WIDTH),
    case(L.RegularBridge, "", nn.Identity, WIDTH),
    case(L.Mlp, "", lambda: block().mlp, WIDTH, 2 * WIDTH),
    case(L.Mlp, "octic", lambda: block().mlp, WIDTH, 2 * WIDTH, group=OCTIC),
    case(L.Attention, "fused", lambda: block().attn, WIDTH, HEADS, use_fused_attn=True),
    case(L.Attention, "explicit", lambda: block().attn, WIDTH, HEADS, use_fused_attn=False),
    case(L.Attention, "mixer", lambda: block().attn, WIDTH, HEADS, use_attn_mixer=True),
    case(L.Attention, "octic", lambda: block().attn, WIDTH, HEADS, group=OCTIC),
    case(L.Block, "fused", block, WIDTH, HEADS, use_fused_attn=True),
    case(L.Block, "mixer", block, WIDTH, HEADS, use_attn_mixer=True),
    case(L.Block, "stochastic depth", block, WIDTH, HEADS, drop_path=0.5),
    case(L.Block, "octic", block, WIDTH, HEADS, group=OCTIC),
    *(case(L.MixerBlock, f"decomposed tokens, {kind}{more}", block, CHANNELS, grid.rep,
           drop_path=rate, size=size)
      for more, rate in (("", 0.0), (", stochastic depth", 0.5)) for kind, size, grid in GRIDS),
    case(L.ConvBlock, "", partial(L.OrdinaryConvBlock, WIDTH, 7), WIDTH, 7, size=ODD, form="maps"),
    case(L.ConvBlock, "LayerScale, stochastic depth", partial(L.OrdinaryConvBlock, WIDTH, 3),
         WIDTH, 3, init_value=1.0, drop_path=0.5, size=ODD, form="maps"),
    case(L.MirrorConv2d, "stem", stem, COLOURS, WIDTH, (4, 4), (4, 4), size=(12, 20),
         form="image"),
    case(L.MirrorConv2d, "2x2 stride 2", channels_last(WIDTH, WIDER, 2, 2), CHANNELS, WIDER,
         (2, 2), (2, 2), size=(4, 6), form="maps"),
    case(L.MirrorConv2d, "3x3, padded", channels_last(WIDTH, WIDTH, 3, padding=1), CHANNELS, WIDTH,
         (3, 3), padding=(1, 1), size=ODD, form="maps"),
    case(L.MirrorDepthwiseConv2d, "7x7", depthwise(kernel_size=7), WIDTH, size=(6, 9),
         form="maps"),
    case(L.MirrorDepthwiseConv2d, "3x3, no bias, even width", depthwise(kernel_size=3), WIDTH, 3,
         bias=False, form="maps"),
    *(case(L.PatchEmbed, f"{kind} grid", lambda: nn.Sequential(stem(), nn.Flatten(1, 2)), size,
           PATCH, 3, WIDTH, scale=scale, size=size, form="image")
      for kind, size, scale in (("even", (12, 16), 0.5**0.5), ("odd", (12, 20), 1.0))),
    *(case(order, f"to mirror order, {kind}", partial(nn.Flatten, 1, 2), grid.to_mirror_order,
           name="MirrorGrid", size=size, form="maps") for kind, size, grid in GRIDS),
    *(case(order, f"to image order, {kind}", partial(nn.Unflatten, 1, size), grid.to_image_order,
           name="MirrorGrid", size=size) for kind, size, grid in GRIDS),
    *(case(positions, kind, learned(used[0] * used[1], lambda x, own: 0.1 * x + own), own, used,
           name="PositionEmbedding", size=used)
      for kind, own, used in (
          ("even", EVEN, EVEN), ("odd", ODD, ODD), ("resampled", EVEN, (4, 5)))),
    case(prefix, "", learned(2, prepended), name="PrefixToken"),
)  # fmt: skip
