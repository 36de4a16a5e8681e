"""Pruning, weight and spectral norms, in their forms by hooks and by parametrisation."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import CLASSES, create, equivariance_errors, images, inner_linears, train
from torch import nn
from torch.nn.utils import (
    parametrizations,
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")


def pruned(module: nn.Linear) -> None:
    prune.l1_unstructured(module, "weight", 0.5)


def parametrized(module: nn.Linear) -> None:
    parametrize.remove_parametrizations(module, "weight")


# id: (put on a linear map, take off again, parameters that it makes)
TOOLS = {
    "prune": (pruned, lambda m: prune.remove(m, "weight"), ["weight_orig"]),
    "weight_norm by hooks": (weight_norm, remove_weight_norm, ["weight_g", "weight_v"]),
    "weight_norm": (
        parametrizations.weight_norm,
        parametrized,
        ["parametrizations.weight.original0", "parametrizations.weight.original1"],
    ),
    "spectral_norm by hooks": (spectral_norm, remove_spectral_norm, ["weight_orig"]),
    "spectral_norm": (
        parametrizations.spectral_norm,
        parametrized,
        ["parametrizations.weight.original"],
    ),
}


@pytest.fixture(params=TOOLS)
def tool(request):
    return TOOLS[request.param]


def applied(model: nn.Module, put) -> nn.Module:
    for module in inner_linears(model).values():
        put(module)
    return model


def test_effect_and_removal(linear_network, tool):
    put, take_off, names = tool
    model, x = create(linear_network), images()
    before, keys = model(x), list(model.state_dict())
    changed = applied(copy.deepcopy(model), put).eval()
    with torch.no_grad():
        if len(names) == 2:  # a norm of weights starts at the weights that it is put on
            torch.testing.assert_close(changed(x), before, rtol=1e-4, atol=1e-4)
            for module in inner_linears(changed).values():
                module.get_parameter(names[0]).mul_(1.5)
        after = changed(x)
        assert (after - before).norm() > 0.02 * before.norm()
        assert max(equivariance_errors(changed, x)) < 1e-4

        # what wrapped networks save, they load
        other = applied(create(linear_network), put).eval()
        other.load_state_dict(changed.state_dict())
        torch.testing.assert_close(other(x), after)

        for module in inner_linears(changed).values():
            take_off(module)
    torch.testing.assert_close(changed(x), after, rtol=1e-4, atol=1e-5)
    assert sorted(changed.state_dict()) == sorted(keys)
    model.load_state_dict(changed.state_dict())
    torch.testing.assert_close(model(x), after, rtol=1e-4, atol=1e-5)


def test_training(linear_network, tool):
    put, _, names = tool
    model = applied(create(linear_network).train(), put)
    zeros = {}
    if put is pruned:
        zeros = {n: m.weight == 0 for n, m in inner_linears(model).items()}
        assert all(0.4 < mask.float().mean() < 0.6 for mask in zeros.values())
    start = {f"{n}.{name}": m.get_parameter(name).clone()
             for n, m in inner_linears(model).items() for name in names}  # fmt: skip

    with torch.no_grad():  # spectral norms are found step by step
        for _ in range(15):
            model(images(2))

    def after():
        with torch.no_grad():
            model(images(2))
        for name, mask in zeros.items():
            assert (inner_linears(model)[name].weight[mask] == 0).all()

    losses = train(model, lr=1e-3, after=after)
    assert losses[-1] < losses[0]
    still = {n for n, value in start.items() if torch.equal(model.get_parameter(n), value)}
    assert still == set()
    assert max(equivariance_errors(model.eval(), images())) < 1e-4


def test_pruning_a_mirrored_kernel_and_its_bias():
    """Not a linear map, and its bias is used by the layer around it."""
    model, x = create("isotropic convnext"), images()
    before = model(x)
    for name in ("weight", "bias"):
        prune.l1_unstructured(model.stem.proj_sym, name, 0.5)
    assert not torch.allclose(model(x), before, rtol=1e-2)
    mask = model.stem.proj_sym.bias_mask.clone()
    train(model)
    model(x)
    assert (model.stem.proj_sym.bias[mask == 0] == 0).all()
    assert max(equivariance_errors(model, x)) < 1e-4
    assert model(x).shape == (4, CLASSES)
