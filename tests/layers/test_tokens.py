"""Token order, patch embedding, position embedding and prefix tokens."""

import pytest
import torch
from checks import Packed, cat, close, features, on_tokens, random_layer

from deit.groups import FLOP
from deit.layers import (
    MirrorGrid,
    MirrorHalves,
    MirrorOrder,
    PatchEmbed,
    PositionEmbedding,
    PrefixToken,
)

SIZES = [(1, 1), (1, 4), (2, 3), (3, 6), (4, 5), (2, 1)]
GRIDS = pytest.mark.parametrize(("height", "width"), SIZES)


@GRIDS
def test_orders(height, width):
    """Mirror order and back; flopping the image mirrors the tokens; a permutation names patches."""
    grid = MirrorGrid(height, width)
    x = features(2, height, width, 3)
    tokens = grid.to_mirror_order(x)
    assert torch.equal(grid.to_image_order(tokens), x)
    assert torch.equal(grid.mirror(tokens), grid.to_mirror_order(x.flip(2)))
    assert sum(grid.blocks) == grid.rep.size == height * width
    permutation = grid.permutation()
    assert permutation.dtype == torch.int64
    assert torch.equal(tokens, x.flatten(1, 2)[:, permutation])
    assert torch.equal(MirrorGrid.from_permutation(permutation).permutation(), permutation)


def test_left_half_then_middle_then_right_half_mirrored():
    assert MirrorGrid(2, 4).permutation().tolist() == [0, 1, 4, 5, 3, 2, 7, 6]
    assert MirrorGrid(2, 3).permutation().tolist() == [0, 3, 1, 4, 2, 5]
    halves = MirrorHalves(MirrorGrid(2, 4)).state_dict()
    assert {k: v.tolist() for k, v in halves.items()} == {
        "left_idx": [0, 1, 4, 5],
        "right_idx": [3, 2, 7, 6],
    }
    odd = MirrorHalves(MirrorGrid(2, 3)).state_dict()
    assert [v.tolist() for v in odd.values()] == [[0, 3], [1, 4], [2, 5]]
    assert list(MirrorOrder(MirrorGrid(2, 3)).state_dict()) == ["permutation"]


def test_an_order_of_no_grid():
    with pytest.raises(ValueError, match="not that of any grid"):
        MirrorGrid.from_permutation(torch.tensor([2, 0, 1]))


@pytest.mark.parametrize(("scale", "size"), [(0.5**0.5, (4, 8)), (1.0, (6, 6))])
def test_patch_formula(scale, size):
    """Patch by patch: an inner product with each whole kernel, times the scale."""
    layer = random_layer(PatchEmbed(size, 2, 3, 6, scale=scale))
    x = features(1, 3, *size)
    half_sym, half_asym = layer.proj_sym.weight, layer.proj_asym.weight
    sym = torch.cat([half_sym, half_sym.flip(-1)], -1)
    asym = torch.cat([half_asym, -half_asym.flip(-1)], -1)
    y = Packed(layer)(x)
    for token, patch in enumerate(layer.grid.permutation().tolist()):
        i, j = divmod(patch, size[1] // 2)
        pixels = x[0, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        s = torch.einsum("ochw,chw->o", sym, pixels) + layer.proj_sym.bias
        a = torch.einsum("ochw,chw->o", asym, pixels)
        close(y[0, token], scale * torch.cat([s, a]))


def test_patch_errors_show_what_would_be_right():
    with pytest.raises(ValueError, match=r"30 x 33 pixels .* patches of 16 x 16.* 32 x 32"):
        PatchEmbed((30, 33), 16)
    with pytest.raises(ValueError, match=r"16 x 16 pixels, the network was made for 32 x 32"):
        PatchEmbed(32, 16)(torch.zeros(1, 3, 16, 16))


@GRIDS
@pytest.mark.parametrize(("other_height", "other_width"), [(3, 4), (2, 5)])
def test_position_embedding_is_left_alone(height, width, other_height, other_width):
    """On its own grid, and resampled to another."""
    grid, other = MirrorGrid(height, width), MirrorGrid(other_height, other_width)
    layer = random_layer(PositionEmbedding(6, grid))
    for packed, g in ((cat(layer()), grid), (cat(layer(other)), other)):
        assert packed.shape == (1, g.height * g.width, 6)
        close(on_tokens(6, g)(1, packed), packed)
    layer.set_grid(other)
    close(cat(layer()), packed)


def test_position_formula():
    """The table: 0 on both halves of s; 1 on the left half of a, minus 1 on the right."""
    layer = random_layer(PositionEmbedding(6, MirrorGrid(2, 4)))
    sym, asym = layer.get_parameter("0"), layer.get_parameter("1")
    expected = torch.cat([torch.cat([sym, asym], -1), torch.cat([sym, -asym], -1)], 1)
    close(cat(layer()), expected)
    odd = cat(random_layer(PositionEmbedding(6, MirrorGrid(2, 3)))())
    assert torch.equal(odd[:, 2:4, 3:], torch.zeros(1, 2, 3, dtype=torch.float64))
    assert odd.count_nonzero() == odd.numel() - 6


def test_prefix_tokens_have_no_antisymmetric_part():
    layer = random_layer(PrefixToken(8, count=3))
    y = cat(layer(5))
    assert y.shape == (5, 3, 8)
    rep = FLOP.regular(8)
    assert torch.equal(rep.act(1, y), y)
    assert torch.equal(y[0, :, :4], layer.get_parameter("0")[0])
    assert y[0, :, :4].count_nonzero() == 12
