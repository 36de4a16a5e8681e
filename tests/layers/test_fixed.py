"""Buffers that no checkpoint may change."""

import pytest
import torch

from deit.layers import (
    MirrorDepthwiseConv2d,
    MirrorGrid,
    MirrorHalves,
    MirrorOrder,
    PrefixToken,
)


@pytest.mark.parametrize(
    ("make", "key", "message"),
    [
        (lambda: MirrorOrder(MirrorGrid(2, 4)), "permutation", "token order of a 2 x 4 grid"),
        (lambda: MirrorHalves(MirrorGrid(2, 4)), "left_idx", "token order of a 2 x 4 grid"),
        (lambda: MirrorHalves(MirrorGrid(2, 4)), "right_idx", "token order of a 2 x 4 grid"),
        (lambda: MirrorHalves(MirrorGrid(2, 5)), "middle_idx", "token order of a 2 x 5 grid"),
        (lambda: PrefixToken(8), "1", "zero, as equivariance demands"),
        (lambda: MirrorDepthwiseConv2d(8), "sym_to_asym.zero_center", "centre column"),
    ],
)
def test_another_value_is_an_error(make, key, message):
    module = make()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    state[key] += 1
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)


def test_modules_made_without_memory_get_their_values_back():
    with torch.device("meta"):
        module = MirrorOrder(MirrorGrid(3, 3))
    assert module.permutation.is_meta
    module.to_empty(device="cpu")
    module.permutation.fill_(-1)
    module.reset_parameters()
    assert torch.equal(module.permutation, MirrorGrid(3, 3).permutation())
