"""Token order, position embedding, and buffers that no checkpoint may change."""

import pytest
import torch
from checks import cat, close, features, on_tokens, random_layer

from deit.layers import (
    MirrorDepthwiseConv2d,
    MirrorGrid,
    MirrorHalves,
    MirrorOrder,
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
    even, odd = MirrorGrid(2, 4), MirrorGrid(2, 3)

    def stored(holder):
        return {k: v.tolist() for k, v in holder.state_dict().items()}

    assert stored(MirrorOrder(even)) == {"permutation": [0, 1, 4, 5, 3, 2, 7, 6]}
    assert stored(MirrorOrder(odd)) == {"permutation": [0, 3, 1, 4, 2, 5]}
    assert stored(MirrorHalves(even)) == {"left_idx": [0, 1, 4, 5], "right_idx": [3, 2, 7, 6]}
    halves = {"left_idx": [0, 3], "middle_idx": [1, 4], "right_idx": [2, 5]}
    assert stored(MirrorHalves(odd)) == halves
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


def smooth(grid: MirrorGrid) -> PositionEmbedding:
    """One of the right symmetry, as a function of the place alone."""
    y = (torch.arange(grid.height).double() + 0.5) / grid.height
    x = (torch.arange(grid.width).double() + 0.5) / grid.width
    y, x = torch.meshgrid(y, torch.pi * (x - 0.5), indexing="ij")
    waves = torch.cos(y[..., None] * torch.arange(1, 5) / 4)
    parts = (torch.cos(x)[..., None] * waves, torch.sin(x)[..., None] * waves)
    layer = PositionEmbedding(8, grid).double()
    for parameter, part in zip(layer.parameters(), parts, strict=True):
        parameter.data = grid.to_mirror_order(part[None])[:, : parameter.shape[1]]
    return layer


@pytest.mark.parametrize(
    ("old", "new"),
    [((8, 8), (12, 12)), ((8, 8), (11, 11)), ((11, 11), (8, 8)), ((11, 5), (7, 8))],
    ids=["even to even", "even to odd", "odd to even", "not square"],
)
def test_a_resampled_position_embedding_is_the_same_function_of_the_place(old, new):
    layer, expected = smooth(MirrorGrid(*old)), cat(smooth(MirrorGrid(*new))())
    layer.set_grid(MirrorGrid(*new))
    assert (cat(layer()) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("make", "key", "message"),
    [
        (lambda: MirrorOrder(MirrorGrid(2, 4)), "permutation", "token order of a 2 x 4 grid"),
        (lambda: MirrorHalves(MirrorGrid(2, 5)), "left_idx", "token order of a 2 x 5 grid"),
        (lambda: MirrorHalves(MirrorGrid(2, 5)), "right_idx", "token order of a 2 x 5 grid"),
        (lambda: MirrorHalves(MirrorGrid(2, 5)), "middle_idx", "token order of a 2 x 5 grid"),
        (lambda: PrefixToken(8), "1", "zero, as equivariance demands"),
        (lambda: MirrorDepthwiseConv2d(8), "sym_to_asym.zero_center", "centre column"),
    ],
)
def test_another_fixed_value_is_an_error(make, key, message):
    module = make()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    state[key] += 1
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
