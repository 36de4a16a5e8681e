"""Tools that look at `nn.Linear` alone find both halves of all linear maps, and stay equivariant:
adapters, pruning, norms of weights, quantisation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import create
from tiny import x32
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as QuantizedLinear
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, parametrize, prune

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]
Change = Callable[[nn.Module], Any]


def inner_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The blocks of all equivariant linear maps, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("_sym", "_asym"))
    }


@torch.no_grad()
def equivariance_error(model: nn.Module) -> float:
    """The largest relative one under flopping, of logits and feature maps."""
    x = x32()
    features, mirrored = (
        model.forward_intermediates(z, intermediates_only=True) for z in (x, x.flip(-1))
    )
    pairs = [(model(x), model(x.flip(-1)))]
    for y, z, info in zip(features, mirrored, model.feature_info, strict=True):
        sign = torch.ones(y.shape[1], 1, 1)
        sign[info["symmetric_channels"] :] = -1
        pairs.append((y, z.flip(-1) * sign))
    return max(((y - z).norm() / y.norm()).item() for y, z in pairs)


def on_each(change: Change) -> Change:
    """`change` of all linear maps of a network."""

    def apply(model: nn.Module) -> nn.Module:
        for module in inner_linears(model).values():
            change(module)
        return model

    return apply


def weight_norm(module: nn.Module) -> None:
    """It starts at the weights that it is put on."""
    parametrizations.weight_norm(module).parametrizations.weight.original0.data.mul_(1.5)


def lora(model: nn.Module) -> nn.Module:
    """A LoRA in each half of the linear maps, none of them at its initial zero."""
    peft = pytest.importorskip("peft")
    config = dict(r=2, lora_alpha=4, target_modules=r".*(linear|lin)_(sym|asym)")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return wrapped


put_prune = on_each(lambda module: prune.l1_unstructured(module, "weight", 0.5))
unparametrize = on_each(lambda module: parametrize.remove_parametrizations(module, "weight"))
# put on a network, take off again, parameters that it makes of each linear map
TOOLS: dict[str, tuple[Change, Change, tuple[str, ...]]] = {
    "lora": (lora, lambda model: model.merge_and_unload(), ("lora_A", "lora_B")),
    "prune": (put_prune, on_each(lambda m: prune.remove(m, "weight")), ("weight_orig",)),
    "weight_norm": (on_each(weight_norm), unparametrize, ("original0", "original1")),
    "spectral_norm": (on_each(parametrizations.spectral_norm), unparametrize, ("original",)),
}


@pytest.fixture(params=TOOLS)
def tool(request):
    return TOOLS[request.param]


def test_effect_and_removal(linear_network, tool):
    put, take_off, _ = tool
    model, x = create(linear_network), x32()
    before, keys = model(x), sorted(model.state_dict())
    changed = put(copy.deepcopy(model)).eval()
    with torch.no_grad():
        after = changed(x)
        assert (after - before).norm() > 0.02 * before.norm()
        assert equivariance_error(changed) < 1e-4

        # what wrapped networks save, they load
        other = put(create(linear_network, seed=1)).eval()
        other.load_state_dict(changed.state_dict())
        torch.testing.assert_close(other(x), after)
        plain = take_off(changed)
    torch.testing.assert_close(plain(x), after, rtol=1e-4, atol=1e-5)
    assert sorted(plain.state_dict()) == keys
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(x), after, rtol=1e-4, atol=1e-5)


def test_training(linear_network, tool):
    put, _, made = tool
    plain = create(linear_network).train()
    linears = inner_linears(plain)
    model = put(plain)
    zeros = {name: module.weight == 0 for name, module in linears.items()}
    if put is put_prune:
        assert all(0.4 < mask.float().mean() < 0.6 for mask in zeros.values())
    x, labels = x32(8), torch.arange(8)
    with torch.no_grad():  # spectral norms are found step by step
        for _ in range(15):
            model(x)
    start = {n: p.clone() for n, p in model.named_parameters() if any(part in n for part in made)}
    assert len(start) == len(linears) * len(made)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(x), labels)
        losses.append(loss.item())
        assert all((linears[name].weight[mask] == 0).all() for name, mask in zeros.items())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert [n for n, p in start.items() if torch.equal(model.get_parameter(n), p)] == []
    assert equivariance_error(model.eval()) < 1e-4


def dynamic(model: nn.Module) -> nn.Module:
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no engine for quantised maps")
    return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def weight_only(model: nn.Module) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


# dynamic ranges of activations differ a little between an image and its mirror image
@pytest.mark.parametrize(("quantize", "tolerance"), [(dynamic, 0.05), (weight_only, 1e-4)])
@torch.no_grad()
def test_quantisation(linear_network, quantize, tolerance):
    model, x = create(linear_network), x32()
    quantized, before = quantize(copy.deepcopy(model)), model(x)
    found = [
        isinstance(module, QuantizedLinear) or type(module.weight) is not nn.Parameter
        for module in quantized.modules()
        if isinstance(module, (nn.Linear, QuantizedLinear))
    ]
    assert found == [True] * sum(isinstance(module, nn.Linear) for module in model.modules())
    y, state = quantized(x), quantized.state_dict()
    assert 0 < (y - before).norm() < 0.1 * before.norm()
    assert equivariance_error(quantized) < tolerance
    other = quantize(create(linear_network, seed=1))
    other.load_state_dict(state, assign=quantize is weight_only)
    copies = [other, copy.deepcopy(quantized)]
    if quantize is weight_only:  # torchao puts into its layers what cannot be pickled
        assert list(state) == list(model.state_dict())
    else:
        copies.append(pickle.loads(pickle.dumps(quantized)))
    for same in copies:
        torch.testing.assert_close(same(x), y)
