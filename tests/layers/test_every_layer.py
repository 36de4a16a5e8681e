"""Layers commute with their group on all kinds of sizes.

Every layer, with natural images, gradients and broken forms of it, is checked by
`test_equivariance.py` from the table in `deit/verify/layers.py`. Here are other sizes and groups.
"""

from itertools import product

import pytest
import torch
from checks import BOTH_GROUPS, Packed, check, features, on_tokens, random_layer

from deit.equivariance import channels, compose, image, invariant, tokens
from deit.groups import FLOP, FLOP_X_FLOP, OCTIC, Rep
from deit.layers import (
    GELU,
    Affine,
    Attention,
    Block,
    ConvBlock,
    InvariantBridge,
    LayerNorm,
    Linear,
    MirrorConv2d,
    MirrorDepthwiseConv2d,
    MirrorGrid,
    MirrorKernel,
    MixerBlock,
    Mlp,
    PatchEmbed,
    RegularBridge,
)

EIGHT = FLOP.regular(8)
COLOURS = Rep(FLOP, free=0, fixed=3)


def on_maps(dim: int):
    """Flopping of packed maps with channels last, (B, H, W, dim)."""
    return compose(channels(FLOP.regular(dim)), tokens(lambda x: x.flip(2)))


@BOTH_GROUPS
@pytest.mark.parametrize("n", [16, 24])
def test_layers_of_one_width(n, group):
    rep, heads = group.regular(n), n // 8
    for layer in (
        GELU(n, group=group),
        Affine(n, shift=False, group=group),
        LayerNorm(n, eps=0.3, group=group),
        Mlp(n, n, group=group),
        Attention(n, heads, use_fused_attn=False, group=group),
        Attention(n, heads, qkv_bias=False, use_attn_mixer=True, group=group),
        Block(n, heads, use_attn_mixer=True, group=group),
    ):
        check(Packed(layer, rep), features(3, 5, n), channels(rep), channels(rep), group)


@pytest.mark.parametrize("group", [FLOP, OCTIC, FLOP_X_FLOP], ids=lambda group: group.name)
def test_linear(group):
    for n_in, n_out, bias, pointwise in product((8, 24), (8, 16), (True, False), (True, False)):
        layer = Linear(n_in, n_out, bias, group=group, pointwise=pointwise)
        into, out_of = channels(layer.in_rep), channels(layer.out_rep)
        check(Packed(layer), features(3, 5, n_in), into, out_of, group)


@pytest.mark.parametrize("size", [*product((1, 2, 3), (1, 2, 3, 4, 5))], ids=str)
def test_layers_of_tokens(size):
    """Tokens that flopping moves, and tokens that are decomposed."""
    grid = MirrorGrid(*size)
    count, rows = grid.height * grid.width, grid.rep
    moving, decomposed = on_tokens(8, grid), compose(channels(EIGHT), channels(rows, -2))
    for layer in (Attention(8, 2), Block(8, 2)):
        check(Packed(layer, EIGHT), features(3, count, 8), moving, moving)
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
        for k, bias in product((1, 3, 7), (True, False)):
            layer = Packed(MirrorDepthwiseConv2d(8, k, bias), EIGHT)
            check(layer, features(3, 3, width, 8), on_maps(8), on_maps(8))
        for value in (0.0, 0.1):
            layer = Packed(ConvBlock(8, init_value=value), EIGHT)
            check(layer, features(3, 2, width, 8), on_maps(8), on_maps(8))


def test_a_stride_that_leaves_a_column_out_is_refused():
    strided = MirrorConv2d(EIGHT, 8, (2, 2), (2, 2))
    with pytest.raises(ValueError, match=r"over 7 columns, leaves out 1 .*use 6 or 8"):
        Packed(strided)(torch.zeros(1, 4, 7, 8))


@pytest.mark.parametrize("width", [2, 3, 7, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_kernel_is_its_own_mirror_image(width, sign):
    part = random_layer(MirrorKernel(4, 2, (3, width), sign))
    kernel, _ = part()
    assert kernel.shape == (4, 2, 3, width)
    assert torch.equal(kernel.flip(-1), sign * kernel)
    assert torch.equal(kernel[..., : part.weight.shape[-1]], part.weight)


def test_channels_last_memory_is_kept():
    """Between layers that want channels last no copy is needed."""
    x = tuple(features(2, 6, 6, 4, seed=seed).float() for seed in range(2))
    for part in MirrorDepthwiseConv2d(8)(x):
        assert part.is_contiguous()


@BOTH_GROUPS
def test_bridges(group):
    """Regular features are permuted by copies of the group: element g moves copy h to gh."""
    x, rep = features(3, 5, 16), group.regular(16)

    def permute(g, y):
        moved = [group.table[group.inverse(g)][h] for h in range(group.order)]
        return y.unflatten(-1, (group.order, -1))[..., moved, :].flatten(-2)

    check(Packed(RegularBridge(16, group)), x, channels(rep), permute, group)
    if group is FLOP:
        check(Packed(InvariantBridge(16)), x, channels(rep), invariant)
