"""Hooks fire on all layers, and what is put in the place of a layer has its effect."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from networks import create, create_noisy, images
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from deit.layers import GELU, LayerScale, MirrorHalves, MirrorOrder

# the one argument of our layers is a tuple, in which torch looks for no tensors
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

RANDOM_OR_POINTWISE = (GELU, nn.GELU, LayerScale, nn.Dropout, DropPath)


def skipped_by_fused_attention(model: nn.Module) -> set[str]:
    """`attn_drop`, whose rate alone is read if attention is fused, as in timm."""
    return {
        f"{name}.attn_drop"
        for name, module in model.named_modules()
        if getattr(module, "fused_attn", False)
    }


def called(model: nn.Module) -> dict[str, nn.Module]:
    """All modules inside but lists of modules, holders of published index tensors, and what timm's
    block has for a LayerScale that ours replaces."""
    lists = {"blocks", "stages", "downsample_layers"}
    left_out = lists | skipped_by_fused_attention(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and name not in left_out
        and not name.endswith((".ls1", ".ls2"))
        and not isinstance(module, (MirrorOrder, MirrorHalves))
    }


@pytest.mark.parametrize("build", [create, create_noisy], ids=["eval", "train"])
def test_hooks_fire_once_on_every_layer(network, build):
    model = build(network)
    counts = {kind: Counter() for kind in ("pre", "forward", "backward pre", "backward")}

    def count(kind, name):
        return lambda *args: counts[kind].update([name])

    for name, module in model.named_modules():
        module.register_forward_pre_hook(count("pre", name))
        module.register_forward_hook(count("forward", name))
        module.register_full_backward_pre_hook(count("backward pre", name))
        module.register_full_backward_hook(count("backward", name))
    model(images().requires_grad_()).square().sum().backward()
    for kind, fired in counts.items():
        assert fired == Counter(["", *called(model)]), kind


def test_what_hooks_are_given():
    """Parts at our layers, tensors at the ordinary layers inside them."""
    model = create("vit")
    seen = {}
    layer = model.blocks[0].mlp.fc1
    layer.register_forward_hook(lambda _, x, y: seen.update(input=x, output=y))
    layer.register_full_backward_hook(lambda _, gx, gy: seen.update(grad_in=gx, grad_out=gy))
    inner = layer.linear_asym
    inner.register_full_backward_hook(lambda _, gx, gy: seen.update(inner_in=gx, inner_out=gy))
    model(images().requires_grad_()).square().sum().backward()
    ((s, a),) = seen["input"]
    assert s.shape == a.shape == (4, 17, 8)
    assert [y.shape for y in seen["output"]] == [(4, 17, 32)] * 2
    assert [g.shape for g in seen["grad_out"]] == [(4, 17, 32)] * 2
    # torch gives gradients of arguments that are tensors; the one argument here is a tuple
    assert seen["grad_in"] == (None,)
    assert torch.equal(seen["inner_out"][0], seen["grad_out"][1])
    assert seen["inner_in"][0].shape == a.shape


def test_a_hook_may_change_what_passes(network):
    model, x = create(network), images()
    before = model(x)
    for module in model.modules():
        if isinstance(module, GELU):
            module.register_forward_hook(lambda _, x, y: tuple(part * 0 for part in y))
    assert not torch.allclose(model(x), before, rtol=1e-2)


class Around(nn.Module):
    """Calls the original and changes all tensors that it gives."""

    def __init__(self, original: nn.Module, change) -> None:
        super().__init__()
        self.original = original
        self.change = change

    def forward(self, *args):
        return tree_map_only(Tensor, self.change, self.original(*args))


def ramp(y: Tensor) -> Tensor:
    """`y` plus something that no norm takes away again."""
    return y + torch.linspace(0.5, 1.5, y.numel()).view_as(y).to(y)


@pytest.mark.parametrize("change", [ramp, torch.zeros_like], ids=["more", "zero"])
def test_a_wrapper_in_the_place_of_any_layer_has_its_effect(network, change):
    model, x = create(network), images(2)
    with torch.no_grad():
        before = model(x)
        without = []
        for name, module in called(model).items():
            if isinstance(module, nn.Identity):
                continue
            parent, _, leaf = name.rpartition(".")
            parent = model.get_submodule(parent)
            setattr(parent, leaf, Around(module, change))
            if torch.allclose(model(x), before, rtol=1e-3, atol=1e-4):
                without.append(name)
            setattr(parent, leaf, module)
        assert without == []
        assert torch.equal(model(x), before)
