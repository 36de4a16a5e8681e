"""Every layer commutes with its group, on all kinds of sizes; broken twins are found."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from checks import (
    BOTH_GROUPS,
    Packed,
    breaks,
    cat,
    check,
    features,
    on_maps,
    on_rows,
    on_tokens,
    random_layer,
)
from torch import nn

from deit.equivariance import assert_equivariant, channels, image, invariant
from deit.groups import FLOP, FLOP_X_FLOP, OCTIC, Group, Rep
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
    OrdinaryBlock,
    OrdinaryConvBlock,
    OrdinaryMixerBlock,
    PatchEmbed,
    PositionEmbedding,
    RegularBridge,
)

EIGHT = FLOP.regular(8)
COLOURS = Rep(FLOP, free=0, fixed=3)

# layers that act on the last axis alone: a group and a width to layers of that width
OF_CHANNELS = {
    "GELU": lambda group, n: [GELU(n, group=group)],
    "Affine": lambda group, n: [Affine(n, shift, group=group) for shift in (True, False)],
    "LayerNorm": lambda group, n: [LayerNorm(n, eps, group=group) for eps in (1e-6, 0.3)],
    "Mlp": lambda group, n: [Mlp(n, ratio * n, group=group) for ratio in (1, 3)],
    "Attention": lambda group, n: [
        Attention(
            n,
            n // 8,
            qkv_bias=mode != "mixer",
            use_fused_attn=mode == "fused",
            use_attn_mixer=mode == "mixer",
            group=group,
        )
        for mode in ("fused", "explicit", "mixer")
    ],
    "Block": lambda group, n: [
        Block(n, n // 8, group=group, use_attn_mixer=mixer) for mixer in (False, True)
    ],
}


@BOTH_GROUPS
@pytest.mark.parametrize("name", OF_CHANNELS)
def test_layers_of_one_width(name, group):
    for n in (8, 16, 24):
        if name == "LayerNorm" and n == 8 == group.order:
            continue  # one channel an irrep, and nothing is left of it when it is centred
        rep = group.regular(n)
        for layer in OF_CHANNELS[name](group, n):
            check(Packed(layer, rep), features(3, 5, n), channels(rep), channels(rep), group)


@pytest.mark.parametrize("group", [FLOP, OCTIC, FLOP_X_FLOP], ids=lambda group: group.name)
def test_linear(group):
    for n_in, n_out, bias, pointwise in product((8, 24), (8, 16), (True, False), (True, False)):
        layer = Linear(n_in, n_out, bias, group=group, pointwise=pointwise)
        into, out_of = channels(layer.in_rep), channels(layer.out_rep)
        check(Packed(layer), features(3, 5, n_in), into, out_of, group)


@pytest.mark.parametrize(
    "grid", [MirrorGrid(*size) for size in product((1, 2, 3), (1, 2, 3, 4, 5))], ids=str
)
def test_layers_of_tokens(grid):
    """Tokens that flopping moves, and tokens that are decomposed."""
    count, rows = grid.height * grid.width, grid.rep
    moving, decomposed = on_tokens(8, grid), on_rows(8, rows)
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


@BOTH_GROUPS
def test_bridges(group):
    """Regular features are permuted by copies of the group: element g moves copy h to gh."""
    x, rep = features(3, 5, 16), group.regular(16)

    def permute(g, y):
        moved = [group.table[group.inverse(g)][h] for h in range(group.order)]
        return y.unflatten(-1, (group.order, -1))[..., moved, :].flatten(-2)

    check(Packed(RegularBridge(16, group)), x, channels(rep), permute, group)
    breaks(Packed(RegularBridge(16, group)), x, channels(rep), invariant, group)
    if group is FLOP:
        check(Packed(InvariantBridge(16)), x, channels(rep), invariant)


# broken twins


def mixed_heads() -> Attention:
    """Values whose irreps are not where queries and keys have theirs."""
    layer = random_layer(Attention(16, 2))
    split = layer.split_heads
    layer.split_heads = lambda qkv: (*split(qkv)[:2], split(qkv)[2].roll(1, -1))
    return layer


def shifted(group: Group) -> Attention:
    """With a shift of the last part, where none is allowed."""
    layer = random_layer(Attention(16, 2, group=group))
    last = layer.qkv.blocks()[-1]
    last.bias = nn.Parameter(features(last.weight.shape[0]))
    return layer


SHIFT, DENSE = features(16, seed=1), features(16, 16, seed=2)


@BOTH_GROUPS
def test_broken_layers_of_channels_are_found(group):
    x, action = features(3, 4, 16), channels(group.regular(16))
    linear = random_layer(Packed(Linear(16, 16, group=group)))
    affine = random_layer(Packed(Affine(16, group=group)))
    norm = random_layer(Packed(LayerNorm(16, group=group)))
    for broken in (
        lambda y: linear(y) + SHIFT,
        lambda y: linear(y.flip(-1)),
        lambda y: y @ DENSE,
        lambda y: affine(y) + 1,
        lambda y: norm(y + 1) + 1,
        random_layer(nn.LayerNorm(16)),
        F.gelu,  # in the basis of irreps
        Packed(shifted(group)),
        random_layer(OrdinaryBlock(16, 2)),
    ):
        breaks(broken, x, action, action, group)
    # the components of an irrep may not have scales of their own
    breaks(lambda y: y * SHIFT.abs(), x, channels(OCTIC.regular(16)), channels(OCTIC.regular(16)),
           OCTIC)  # fmt: skip
    breaks(Packed(mixed_heads()), x, channels(FLOP.regular(16)), channels(FLOP.regular(16)))


def test_broken_layers_of_tokens_are_found():
    x, rows = features(3, 6, 8), Rep(FLOP, 3)
    grid = MirrorGrid(1, 6)
    decomposed, moving = on_rows(8, rows), on_tokens(8, grid)
    affine = random_layer(Packed(Affine(8, across=rows)))
    symmetric = torch.tensor([1.0] * 4 + [0.0] * 4, dtype=torch.float64)
    breaks(lambda y: affine(y) + symmetric, x, decomposed, decomposed)
    breaks(random_layer(OrdinaryMixerBlock(8, 6)), x, decomposed, decomposed)
    # right channels, wrong tokens: they are packed, and not in mirror order
    breaks(random_layer(Packed(MixerBlock(EIGHT, rows), EIGHT)), x, moving, moving)
    # a position embedding whose a has the same sign on both sides
    layer = random_layer(PositionEmbedding(8, grid))
    s, a = (part.detach() for part in layer())
    assert_equivariant(lambda y: y + cat((s, a)), FLOP, x, moving, moving)
    breaks(lambda y: y + cat((s, a.abs())), x, moving, moving)


def test_broken_layers_of_images_are_found():
    x, grid = features(2, 3, 4, 8), MirrorGrid(2, 4)
    patches = random_layer(PatchEmbed((4, 8), 2, 3, 8))
    row_major = grid.permutation().argsort()
    breaks(lambda y: cat(patches(y))[:, row_major], x, image(FLOP), on_tokens(8, grid))
    plain = random_layer(nn.Conv2d(3, 8, 2, 2))
    breaks(lambda y: plain(y).permute(0, 2, 3, 1), x, image(FLOP), on_maps(8))
    # a kernel that is not mirrored; the wrong sign of the mirror image; a shift of a'
    x, action = features(3, 5, 6, 8), on_maps(8)
    one, other = (random_layer(MirrorDepthwiseConv2d(8)) for _ in range(2))
    one.sym_to_sym.forward = lambda: (features(2, 1, 7, 7, seed=1), one.sym_to_sym.bias)
    other.sym_to_asym = random_layer(MirrorKernel(2, 1, (7, 7), sign=1))
    dense = random_layer(Packed(MirrorConv2d(EIGHT, 8, (3, 3), padding=(1, 1))))
    check(dense, x, action, action)
    for broken in (
        Packed(one, EIGHT),
        Packed(other, EIGHT),
        lambda y: dense.double()(y) + 1,
        random_layer(OrdinaryConvBlock(8)),
    ):
        breaks(broken, x, action, action)
    # a stride that leaves a column out, which the layer itself refuses
    strided = random_layer(MirrorConv2d(EIGHT, 8, (2, 2), (2, 2)))
    with pytest.raises(ValueError, match=r"over 7 columns, leaves out 1 .*use 6 or 8"):
        Packed(strided)(x.new_zeros(1, 4, 7, 8))

    def unchecked(y):
        return F.conv2d(y.permute(0, 3, 1, 2), *strided.kernel(), 2).permute(0, 2, 3, 1)

    breaks(unchecked, features(2, 4, 7, 8), action, action)
