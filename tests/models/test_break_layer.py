"""The block at which equivariant networks stop being so."""

import pytest
import timm
import torch

import deit.models  # noqa: F401 - registers the networks
from deit.equivariance import equivariance_error, image, invariant, randomize_
from deit.groups import FLOP
from deit.layers import Linear

HYBRID, EARLY = "hybrid_deit_tiny_patch16_LS", "d2_inv_early_deit_tiny_patch16_LS"


def build(name: str, **kwargs) -> torch.nn.Module:
    small = {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": 16, "patch_size": 4}
    return randomize_(timm.create_model(name, num_classes=5, **small, **kwargs).double().eval())


@pytest.mark.parametrize("layer", range(5))
def test_blocks_are_equivariant_up_to_there(layer):
    """Norm and classifier of a hybrid are ordinary ones; the other is invariant to the end."""
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = {}
    for name in (HYBRID, EARLY):
        model = build(name, break_layer=layer)
        errors[name] = equivariance_error(model, FLOP, x, image(FLOP), invariant).error
        kinds = [isinstance(block.attn.qkv, Linear) for block in model.blocks]
        assert kinds == [True] * layer + [False] * (4 - layer)
    assert errors[EARLY] < 1e-10
    assert errors[HYBRID] > 1e-3


@pytest.mark.parametrize("name", [HYBRID, EARLY])
def test_default_is_half_the_depth(name):
    shapes = [
        {key: value.shape for key, value in build(name, **kwargs).state_dict().items()}
        for kwargs in ({}, {"break_layer": 2}, {"break_layer": 1})
    ]
    assert shapes[0] == shapes[1] != shapes[2]
    with pytest.raises(ValueError, match="break_layer 5 is not among the 4 blocks"):
        build(name, break_layer=5)
