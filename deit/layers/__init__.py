"""Equivariant layers, one concept a file.

A feature is a tuple of parts, one tensor an irrep; see `deit.groups`. `**dd` in a constructor is
`device` and `dtype`, as the factories of torch take them.
"""

from deit.layers.activation import GELU as GELU
from deit.layers.activation import quick_gelu as quick_gelu
from deit.layers.affine import Affine as Affine
from deit.layers.affine import LayerScale as LayerScale
from deit.layers.attention import Attention as Attention
from deit.layers.block import Block as Block
from deit.layers.bridge import InvariantBridge as InvariantBridge
from deit.layers.bridge import RegularBridge as RegularBridge
from deit.layers.conv import MirrorConv2d as MirrorConv2d
from deit.layers.conv import MirrorDepthwiseConv2d as MirrorDepthwiseConv2d
from deit.layers.conv import MirrorKernel as MirrorKernel
from deit.layers.conv_block import ConvBlock as ConvBlock
from deit.layers.drop import Dropout as Dropout
from deit.layers.drop import DropPath as DropPath
from deit.layers.fixed import FixedBuffers as FixedBuffers
from deit.layers.linear import Linear as Linear
from deit.layers.linear import as_rep as as_rep
from deit.layers.mixer_block import MixerBlock as MixerBlock
from deit.layers.mlp import Mlp as Mlp
from deit.layers.norm import LayerNorm as LayerNorm
from deit.layers.ordinary import OrdinaryAffine as OrdinaryAffine
from deit.layers.ordinary import OrdinaryBlock as OrdinaryBlock
from deit.layers.ordinary import OrdinaryConvBlock as OrdinaryConvBlock
from deit.layers.ordinary import OrdinaryLayerNorm as OrdinaryLayerNorm
from deit.layers.ordinary import OrdinaryMixerBlock as OrdinaryMixerBlock
from deit.layers.patch_embed import PatchEmbed as PatchEmbed
from deit.layers.tokens import MirrorGrid as MirrorGrid
from deit.layers.tokens import MirrorHalves as MirrorHalves
from deit.layers.tokens import MirrorOrder as MirrorOrder
from deit.layers.tokens import PositionEmbedding as PositionEmbedding
from deit.layers.tokens import PrefixToken as PrefixToken
