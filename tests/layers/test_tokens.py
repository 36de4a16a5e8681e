"""Token order, patch embedding, position embedding and prefix tokens."""

import pytest
import torch
from checks import cat, close, features, on_tokens, random_layer

from deit.layers import (
    MirrorGrid,
    MirrorHalves,
    MirrorOrder,
    PositionEmbedding,
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
