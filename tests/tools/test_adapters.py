"""PEFT's LoRA on the halves: a LoRA of each half is an equivariant LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import create, equivariance_errors, images, inner_linears, train
from torch import nn

peft = pytest.importorskip("peft")

CONFIG = dict(r=2, lora_alpha=4, target_modules=r".*(linear|lin)_(sym|asym)")


def adapted(model: nn.Module) -> nn.Module:
    """`model` with a LoRA in each half of its linear maps, none of them at its initial zero."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**CONFIG))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return wrapped


def test_lora(linear_network, tmp_path):
    """It changes the output, keeps equivariance, survives a file, and merges to the same."""
    model, x = create(linear_network), images()
    before, keys = model(x), list(model.state_dict())
    wrapped = adapted(copy.deepcopy(model))
    after = wrapped(x)
    count = sum(isinstance(m, peft.tuners.lora.Linear) for m in wrapped.modules())
    assert count == len(inner_linears(model))
    assert (after - before).norm() > 0.05 * before.norm()
    assert max(equivariance_errors(wrapped.base_model.model, x)) < 1e-4
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(x), before)
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(loaded(x), after)
    # merged it is an ordinary checkpoint again
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(x), after, rtol=1e-4, atol=1e-5)
    assert list(merged.state_dict()) == keys
    model.load_state_dict(merged.state_dict())
    torch.testing.assert_close(model(x), merged(x))


def test_lora_trains(linear_network):
    model = create(linear_network)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**CONFIG, modules_to_save=["head"]))
    start = {n: p.clone() for n, p in wrapped.named_parameters()}
    losses = train(wrapped, steps=6)
    assert losses[-1] < losses[0]
    for name, parameter in wrapped.named_parameters():
        trained = "lora" in name or "modules_to_save" in name
        assert torch.equal(parameter, start[name]) != trained, name
    assert max(equivariance_errors(wrapped.base_model.model, images())) < 1e-4
