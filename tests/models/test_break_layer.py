"""The block at which equivariant networks stop being so."""

import pytest
import timm
import torch

import deit.layers
import deit.models


def build(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    small = {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": 16, "patch_size": 4}
    model = timm.create_model(name, num_classes=5, **small, **kwargs).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@torch.no_grad()
def mirror_error(model: torch.nn.Module) -> float:
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = model(x)
    return ((model(x.flip(-1)) - logits).norm() / logits.norm()).item()


@pytest.mark.parametrize("layer", range(5))
def test_hybrid_has_equivariant_blocks_up_to_there(layer):
    model = build("hybrid_deit_tiny_patch16_LS", break_layer=layer)
    kinds = [isinstance(block.attn.qkv, deit.layers.Linear) for block in model.blocks]
    assert kinds == [True] * layer + [False] * (4 - layer)
    assert mirror_error(model) > 1e-3  # its norm and classifier are ordinary ones


@pytest.mark.parametrize("layer", range(5))
def test_invariant_early_is_invariant_wherever_it_breaks(layer):
    assert mirror_error(build("d2_inv_early_deit_tiny_patch16_LS", break_layer=layer)) < 1e-10


@pytest.mark.parametrize(
    "name", ["hybrid_deit_tiny_patch16_LS", "d2_inv_early_deit_tiny_patch16_LS"]
)
def test_default_is_half_the_depth(name):
    shapes = [
        {key: value.shape for key, value in build(name, **kwargs).state_dict().items()}
        for kwargs in ({}, {"break_layer": 2}, {"break_layer": 1})
    ]
    assert shapes[0] == shapes[1] != shapes[2]
    with pytest.raises(ValueError, match="break_layer 5 is not among the 4 blocks"):
        build(name, break_layer=5)
