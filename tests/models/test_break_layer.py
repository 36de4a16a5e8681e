"""The block at which equivariant networks stop being so."""

import pytest
from tiny import create, create_random, images

from deit.equivariance import equivariance_error, image, invariant
from deit.groups import FLOP
from deit.layers import Linear

HYBRID, EARLY = "hybrid_deit", "d2_inv_early_deit"


@pytest.mark.parametrize("layer", range(5))
def test_blocks_are_equivariant_up_to_there(layer):
    """Norm and classifier of a hybrid are ordinary ones; the other is invariant to the end."""
    errors = {}
    for name in (HYBRID, EARLY):
        model = create_random(name, break_layer=layer)
        errors[name] = equivariance_error(model, FLOP, images(), image(FLOP), invariant).error
        kinds = [isinstance(block.attn.qkv, Linear) for block in model.blocks]
        assert kinds == [True] * layer + [False] * (4 - layer)
    assert errors[EARLY] < 1e-10
    assert errors[HYBRID] > 1e-3


@pytest.mark.parametrize("name", [HYBRID, EARLY])
def test_default_is_half_the_depth(name):
    kinds = [isinstance(block.attn.qkv, Linear) for block in create(name).blocks]
    assert kinds == [True, True, False, False]
    with pytest.raises(ValueError, match="break_layer 5 is not among the 4 blocks"):
        create(name, break_layer=5)
