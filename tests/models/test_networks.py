"""The published networks: keys, shapes and trainable counts of all 50, logits of one a family.

`tests/fixtures/README.md` says where the facts come from.
"""

import json
import re
from pathlib import Path

import fill
import pytest
import timm
import torch
from torch import nn

import deit.models  # noqa: F401 - registers the names
from deit.layers import FixedBuffers

FACTS = json.loads(Path(fill.__file__).with_name("networks.json").read_text())
NETWORKS = FACTS["networks"]

# The smallest of each family. The others are further rows of the same tables, which differ in
# shapes, and in heads, and these are compared for all.
SMALLEST = [
    *(f"{family}_tiny_patch16_LS" for family in ("d2_deit", "hybrid_deit", "deit")),
    "d2_inv_early_deit_tiny_patch16_LS",
    *("resmlp_equi_d2_12", "resmlp_12", "d2_convnext_tiny"),
    *("d2_convnext_isotropic_small", "convnext_isotropic_small"),
]
HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16}


def size(expression: str, facts: dict) -> int:
    """'1000', or '0.5C' for half of facts['C']."""
    factor, symbol = re.fullmatch(r"([\d.]*)([A-Z]\d?)?", expression).groups()
    value = float(factor or 1) * (facts[symbol] if symbol else 1)
    assert value == int(value), (expression, facts)
    return int(value)


def contract(name: str) -> dict[str, tuple[int, ...]]:
    """Every state-dict key of a published network with its shape."""
    facts = NETWORKS[name]
    keys = {}
    for template, sizes in FACTS["families"][facts["family"]].items():
        shape = tuple(size(s, facts) for s in sizes.split())
        match = re.match(r"(?:blocks|stages\.(\d))\.([ij])\.", template)
        if match is None:
            keys[template] = shape
            continue
        stage, kind = match.groups()
        depth = facts[f"D{stage or ''}"]
        first = facts.get("E", depth)
        for i in range(first) if kind == "i" else range(first, depth):
            keys[re.sub(r"\.[ij]\.", f".{i}.", template, count=1)] = shape
    return keys


def build(name: str) -> nn.Module:
    """The network with the weights of the facts, in float64, without drawing initial ones."""
    with torch.device("meta"):
        model = timm.create_model(name)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, FixedBuffers):
            module.reset_parameters()
    return fill.fill_(model).double().eval()


def test_all_networks_are_here():
    assert len(NETWORKS) == 50
    assert set(NETWORKS) <= set(timm.list_models())


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dict_is_the_published_one(name):
    expected = contract(name)
    with torch.device("meta"):
        model = timm.create_model(name)
        published = {key: torch.empty(shape) for key, shape in expected.items()}
    model.load_state_dict(published, strict=True)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == NETWORKS[name]["trainable"]
    if "deit" in name:
        assert {block.attn.num_heads for block in model.blocks} == {HEADS[model.embed_dim]}


@pytest.mark.parametrize("name", SMALLEST)
@torch.inference_mode()
def test_logits_are_the_published_ones(name):
    facts, model = NETWORKS[name], build(name)
    logits = model(fill.images())
    expected = torch.tensor(facts["logits"], dtype=torch.float64)
    assert (logits[:, :8] - expected).norm() < 1e-8 * expected.norm()
    assert logits.norm().item() == pytest.approx(facts["logits_norm"], rel=1e-10)
    if name == "d2_deit_tiny_patch16_LS":  # not vacuous: another eps would show
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps = 1e-5
        assert (model(fill.images())[:, :8] - expected).norm() > 1e-7 * expected.norm()
