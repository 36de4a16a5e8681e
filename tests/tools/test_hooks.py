"""Hooks fire on all layers, and what is put in the place of a layer has its effect."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from networks import create, create_noisy
from tiny import x32
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from deit.layers import MirrorHalves, MirrorOrder

# the one argument of our layers is a tuple, in which torch looks for no tensors
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def called(model: nn.Module) -> dict[str, nn.Module]:
    """All modules inside but lists of modules, holders of published index tensors, what timm's
    block has for a LayerScale that ours replaces, and `attn_drop`, whose rate alone is read if
    attention is fused, as in timm."""
    left_out = {"", "blocks", "stages", "downsample_layers"} | {
        f"{name}.attn_drop"
        for name, module in model.named_modules()
        if getattr(module, "fused_attn", False)
    }
    return {
        name: module
        for name, module in model.named_modules()
        if name not in left_out
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
    model(x32().requires_grad_()).square().sum().backward()
    assert counts == {kind: Counter(["", *called(model)]) for kind in counts}


def test_what_hooks_are_given():
    """Parts at our layers, tensors at the ordinary layers inside them."""
    model = create("vit")
    seen = {}
    layer = model.blocks[0].mlp.fc1
    layer.register_forward_hook(lambda _, x, y: seen.update(input=x, output=y))
    layer.register_full_backward_hook(lambda _, gx, gy: seen.update(grad_in=gx, grad_out=gy))
    inner = layer.linear_asym
    inner.register_full_backward_hook(lambda _, gx, gy: seen.update(inner_in=gx, inner_out=gy))
    model(x32().requires_grad_()).square().sum().backward()
    ((s, a),) = seen["input"]
    assert s.shape == a.shape == seen["inner_in"][0].shape == (2, 17, 8)
    assert [y.shape for y in (*seen["output"], *seen["grad_out"])] == [(2, 17, 32)] * 4
    # torch gives gradients of arguments that are tensors; the one argument here is a tuple
    assert seen["grad_in"] == (None,)
    assert torch.equal(seen["inner_out"][0], seen["grad_out"][1])


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
@torch.no_grad()
def test_a_wrapper_in_the_place_of_any_layer_has_its_effect(network, change):
    model, x = create(network), x32()
    before = model(x)
    without = []
    for name, module in called(model).items():
        if not isinstance(module, nn.Identity):
            model.set_submodule(name, Around(module, change))
            if torch.allclose(model(x), before, rtol=1e-3, atol=1e-4):
                without.append(name)
            model.set_submodule(name, module)
    assert without == []
    assert torch.equal(model(x), before)
