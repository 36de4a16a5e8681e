"""PEFT's LoRA on the halves: a LoRA of each half is an equivariant LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import create, create_noisy, equivariance_errors, images, inner_linears, train
from torch import nn

peft = pytest.importorskip("peft")

CONFIG = dict(r=2, lora_alpha=4, target_modules=r".*(linear|lin)_(sym|asym)")


def adapted(model: nn.Module, **kwargs) -> nn.Module:
    """`model` with a LoRA in each half of its linear maps, none of them at its initial zero."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**CONFIG, **kwargs}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return wrapped


def test_lora_changes_the_output_and_merges_to_the_same(network):
    model, x = create(network), images()
    before, keys = model(x), list(model.state_dict())
    count = len(inner_linears(model))
    wrapped = adapted(copy.deepcopy(model))
    after = wrapped(x)
    assert sum(isinstance(m, peft.tuners.lora.Linear) for m in wrapped.modules()) == count
    assert (after - before).norm() > 0.05 * before.norm()
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(x), before)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(x), after, rtol=1e-4, atol=1e-5)
    # an ordinary checkpoint again
    assert list(merged.state_dict()) == keys
    model.load_state_dict(merged.state_dict())
    torch.testing.assert_close(model(x), merged(x))


def test_networks_stay_equivariant_with_lora(network):
    wrapped = adapted(create(network))
    assert max(equivariance_errors(wrapped.base_model.model, images())) < 1e-4
    assert max(equivariance_errors(wrapped.merge_and_unload(), images())) < 1e-4


@pytest.mark.parametrize("build", [create, create_noisy], ids=["eval", "train"])
def test_lora_trains(network, build):
    model = build(network)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**CONFIG, modules_to_save=["head"]))
    frozen = {n: p.clone() for n, p in wrapped.named_parameters() if not p.requires_grad}
    gradients = {n: 0.0 for n, p in wrapped.named_parameters() if "lora_B" in n}

    def after():
        for name in gradients:
            gradients[name] += wrapped.get_parameter(name).grad.abs().max().item()

    losses = train(wrapped, steps=6, after=after)
    if build is create:
        assert losses[-1] < losses[0]
    assert all(gradients.values())
    for name, value in frozen.items():
        assert torch.equal(wrapped.get_parameter(name), value)
    assert max(equivariance_errors(wrapped.eval().base_model.model, images())) < 1e-4


def test_adapters_survive_a_file(network, tmp_path):
    model, x = create(network), images()
    wrapped = adapted(copy.deepcopy(model))
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(loaded(x), wrapped(x))
