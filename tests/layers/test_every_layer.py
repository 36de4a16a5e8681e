"""Layers commute with their group on all kinds of sizes.

Every layer, with natural images, gradients and broken forms of it, is checked by
`test_equivariance.py` from the table in `deit/verify/layers.py`. Here are other sizes and groups.
"""

from itertools import product

import pytest
import torch
from checks import BOTH_GROUPS, Packed, check, features, on_tokens

from deit.equivariance import channels, compose, image, tokens
from deit.groups import FLOP, Rep
from deit.layers import (
    Affine,
    Attention,
    Block,
    ConvBlock,
    MirrorConv2d,
    MirrorDepthwiseConv2d,
    MirrorGrid,
    MixerBlock,
    PatchEmbed,
)

EIGHT = FLOP.regular(8)
COLOURS = Rep(FLOP, free=0, fixed=3)


def on_maps(dim: int):
    """Flopping of packed maps with channels last, (B, H, W, dim)."""
    return compose(channels(FLOP.regular(dim)), tokens(lambda x: x.flip(2)))


@BOTH_GROUPS
def test_attention_mixer(group):
    rep = group.regular(24)
    layer = Attention(24, 3, qkv_bias=False, use_attn_mixer=True, group=group)
    check(Packed(layer), features(3, 5, 24), channels(rep), channels(rep), group)


@pytest.mark.parametrize("size", [*product((1, 2, 3), (1, 2, 3, 4, 5))], ids=str)
def test_layers_of_tokens(size):
    """Tokens that flopping moves, and tokens that are decomposed."""
    grid = MirrorGrid(*size)
    count, rows = grid.height * grid.width, grid.rep
    moving, decomposed = on_tokens(8, grid), compose(channels(EIGHT), channels(rows, -2))
    check(Packed(Block(8, 2), EIGHT), features(3, count, 8), moving, moving)
    for layer in (Affine(8, across=rows), MixerBlock(EIGHT, rows)):
        check(Packed(layer, EIGHT), features(3, count, 8), decomposed, decomposed)
    for patch in (1, 2, 3):
        layer = PatchEmbed((grid.height * 2, grid.width * patch), (2, patch), 3, 8)
        assert layer.num_patches == count
        check(Packed(layer), features(3, 3, *layer.img_size), image(FLOP), moving)


def test_layers_of_maps():
    """Convolutions, wherever the stride leaves no column out."""
    sizes = product((1, 2), (1, 2, 3, 4), (1, 2, 3), (0, 1), (1, 2, 4))
    for n, k, stride, padding, count in sizes:
        width = (count - 1) * stride + k - 2 * padding
        if width > 0 and padding < k:
            layer = MirrorConv2d(
                FLOP.regular(2 * n), 4, (1, k), (1, stride), (0, padding), scale=0.5
            )
            x = features(3, 2, width, 2 * n)
            check(Packed(layer), x, on_maps(2 * n), on_maps(4))
            assert Packed(layer)(x).shape == (3, 2, count, 4)
    for patch, count in product((1, 2, 3, 4), (1, 2, 3)):
        layer = MirrorConv2d(COLOURS, 4, (2, patch), (2, patch))
        check(Packed(layer), features(2, 3, 4, count * patch), image(FLOP), on_maps(4))
    for width in (1, 2, 3, 4, 6):
        depthwise = (MirrorDepthwiseConv2d(8, k, b) for k, b in product((1, 3, 7), (True, False)))
        for layer in (*depthwise, *(ConvBlock(8, init_value=value) for value in (0.0, 0.1))):
            check(Packed(layer, EIGHT), features(3, 3, width, 8), on_maps(8), on_maps(8))


def test_a_stride_that_leaves_a_column_out_is_refused():
    strided = MirrorConv2d(EIGHT, 8, (2, 2), (2, 2))
    with pytest.raises(ValueError, match=r"over 7 columns, leaves out 1 .*use 6 or 8"):
        Packed(strided)(torch.zeros(1, 4, 7, 8))


def test_channels_last_memory_is_kept():
    """Between layers that want channels last no copy is needed."""
    x = tuple(features(2, 6, 6, 4, seed=seed).float() for seed in range(2))
    assert all(part.is_contiguous() for part in MirrorDepthwiseConv2d(8)(x))
