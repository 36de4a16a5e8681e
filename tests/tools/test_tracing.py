"""Symbolic tracing, feature extraction, TorchScript and copies give the same bits as the network.

A traced network runs the same operations in the same order, so nothing is rounded differently.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import create, create_noisy
from tiny import x32
from torch.fx import symbolic_trace
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from deit.layers import Block, ConvBlock, MixerBlock

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
MODES = pytest.mark.parametrize("build", [create, create_noisy], ids=["eval", "train"])


def untraceable(network: str) -> None:
    """Skip networks that torch cannot trace symbolically."""
    vit = "vit" in network or network in ("hybrid", "invariant-early")
    if vit and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("torch 2.6 cannot trace timm's attention, nor the expansion of a class token")


@MODES
def test_symbolic_tracing(any_network, build):
    """The same logits for batches of two sizes, and the same gradients."""
    untraceable(any_network)
    model = build(any_network)
    traced = symbolic_trace(model)
    for batch in (4, 3):
        results = []
        for module in (model, traced):
            with torch.random.fork_rng():
                model.zero_grad()
                y = module(x32(batch))
                y.square().sum().backward()
            results.append([y, *(p.grad for p in model.parameters())])
        assert all(map(torch.equal, *results))
        torch.rand(1)  # another draw of what is dropped


@pytest.mark.parametrize("traced", [False, True], ids=["script", "trace"])
def test_torchscript(any_network, traced, tmp_path):
    """Scripting goes through the network's own hook, which scripts its traced graph."""
    if not traced:
        untraceable(any_network)
    model = create(any_network)
    keys = list(model.state_dict())
    made = torch.jit.trace(model, x32()) if traced else torch.jit.script(model)
    made.save(tmp_path / "network.pt")
    for network in (made, torch.jit.load(tmp_path / "network.pt")):
        for batch in (2, 3):
            assert torch.equal(network(x32(batch)), model(x32(batch)))
    assert list(model.state_dict()) == keys


def test_copies_and_pickles(any_network, tmp_path):
    model, x = create(any_network), x32()
    torch.save(model, tmp_path / "whole.pt")
    assigned = create(any_network)
    assigned.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    for other in (
        assigned,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "whole.pt", weights_only=False),
    ):
        torch.testing.assert_close(other(x), model(x))
        other.load_state_dict(model.state_dict())


@MODES
def test_features_down_to_both_halves_of_a_linear_map(network, build):
    untraceable(network)
    model, x = build(network), x32()
    kinds = (Block, ConvBlock, MixerBlock)
    block = next(name for name, module in model.named_modules() if isinstance(module, kinds))
    first = f"{block}.pwconv1" if "convnext" in network else f"{block}.mlp.fc1"
    expected = {}
    for half in ("sym", "asym"):
        node = f"{first}.{model.get_submodule(first).prefix}_{half}"
        model.get_submodule(node).register_forward_hook(
            lambda _, x, y, node=node: expected.setdefault(node, y)
        )
    with torch.random.fork_rng():
        y = model(x)
    for names in get_graph_node_names(model):
        assert set(expected) <= set(names)
    outputs = create_feature_extractor(model, [*expected, "head"]).train(model.training)(x)
    # torchvision loses the division in place of timm's own DropPath
    if not model.training or network not in ("hybrid", "invariant-early"):
        expected["head"] = y
    assert {node for node, own in expected.items() if not torch.equal(outputs[node], own)} == set()
