"""Equivariant layers, one concept a file.

A feature is a tuple of parts, one tensor an irrep; see `deit.groups`. `**dd` in a constructor is
`device` and `dtype`, as the factories of torch take them.
"""

from deit.layers.activation import GELU, quick_gelu
from deit.layers.affine import Affine, LayerScale
from deit.layers.attention import Attention
from deit.layers.block import Block
from deit.layers.bridge import InvariantBridge, RegularBridge
from deit.layers.conv import MirrorConv2d, MirrorDepthwiseConv2d, MirrorKernel
from deit.layers.conv_block import ConvBlock
from deit.layers.drop import Dropout, DropPath
from deit.layers.fixed import FixedBuffers
from deit.layers.linear import Linear, as_rep
from deit.layers.mixer_block import MixerBlock
from deit.layers.mlp import Mlp
from deit.layers.norm import LayerNorm
from deit.layers.ordinary import (
    OrdinaryAffine,
    OrdinaryBlock,
    OrdinaryConvBlock,
    OrdinaryLayerNorm,
    OrdinaryMixerBlock,
)
from deit.layers.patch_embed import PatchEmbed
from deit.layers.tokens import (
    MirrorGrid,
    MirrorHalves,
    MirrorOrder,
    PositionEmbedding,
    PrefixToken,
)

__all__ = [
    "GELU",
    "Affine",
    "Attention",
    "Block",
    "ConvBlock",
    "DropPath",
    "Dropout",
    "FixedBuffers",
    "InvariantBridge",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "MirrorConv2d",
    "MirrorDepthwiseConv2d",
    "MirrorGrid",
    "MirrorHalves",
    "MirrorKernel",
    "MirrorOrder",
    "MixerBlock",
    "Mlp",
    "OrdinaryAffine",
    "OrdinaryBlock",
    "OrdinaryConvBlock",
    "OrdinaryLayerNorm",
    "OrdinaryMixerBlock",
    "PatchEmbed",
    "PositionEmbedding",
    "PrefixToken",
    "RegularBridge",
    "as_rep",
    "quick_gelu",
]
