"""Symbolic tracing, feature extraction, TorchScript and copies give the same bits as the network.

A traced network runs the same operations in the same order, so nothing is rounded differently.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import create, create_noisy, images
from timm.models import create_feature_extractor as timm_extractor
from torch import nn
from torch.fx import symbolic_trace
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from deit.layers import Block, ConvBlock, MixerBlock

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")


def untraceable(network: str) -> None:
    """Skip networks that torch cannot trace symbolically."""
    vit = "vit" in network or network in ("hybrid", "invariant-early")
    if vit and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("torch 2.6 cannot trace timm's attention, nor the expansion of a class token")


@pytest.mark.parametrize("build", [create, create_noisy], ids=["eval", "train"])
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
                y = module(images(batch))
                y.square().sum().backward()
            results.append([y, *(p.grad for p in model.parameters())])
        assert all(map(torch.equal, *results))
        torch.rand(1)  # another draw of what is dropped


def test_scripting(any_network):
    """Through the network's own hook, which scripts its traced graph."""
    untraceable(any_network)
    model, x = create(any_network), images()
    keys = list(model.state_dict())
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), model(x))
    assert torch.equal(scripted(images(3)), model(images(3)))
    assert list(model.state_dict()) == keys


def test_jit_tracing(any_network, tmp_path):
    model, x = create(any_network), images()
    traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x), model(x))
    assert torch.equal(traced(images(3)), model(images(3)))
    traced.save(tmp_path / "traced.pt")
    assert torch.equal(torch.jit.load(tmp_path / "traced.pt")(x), model(x))


def test_copies_and_pickles(any_network, tmp_path):
    model, x = create(any_network), images()
    y = model(x)
    torch.save(model, tmp_path / "whole.pt")
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "whole.pt", weights_only=False),
    ):
        torch.testing.assert_close(other(x), y)
        other.load_state_dict(model.state_dict())


def first_block(model: nn.Module) -> str:
    kinds = (Block, ConvBlock, MixerBlock)
    return next(name for name, module in model.named_modules() if isinstance(module, kinds))


@pytest.mark.parametrize("build", [create, create_noisy], ids=["eval", "train"])
def test_features_down_to_both_halves_of_a_linear_map(network, build):
    untraceable(network)
    model, x = build(network), images()
    block = first_block(model)
    first = f"{block}.pwconv1" if "convnext" in network else f"{block}.mlp.fc1"
    layer = model.get_submodule(first)
    nodes = [f"{first}.{layer.prefix}_{half}" for half in ("sym", "asym")]
    expected = {}
    for node in nodes:
        hook = model.get_submodule(node).register_forward_hook(
            lambda _, x, y, node=node: expected.update({node: y})
        )
        with torch.random.fork_rng():
            y = model(x)
        hook.remove()
    for names in get_graph_node_names(model):
        assert set(nodes) <= set(names)
    extractor = create_feature_extractor(model, [*nodes, "head"])
    outputs = extractor.train(model.training)(x)
    for node in nodes:
        assert torch.equal(outputs[node], expected[node])
    # torchvision loses the division in place of timm's own DropPath
    if not model.training or network not in ("hybrid", "invariant-early"):
        assert torch.equal(outputs["head"], y)


def test_features_by_timm(any_network):
    untraceable(any_network)
    model, x = create(any_network), images()
    middle = "blocks.1" if hasattr(model, "blocks") else "stages.1"
    outputs = timm_extractor(model, {middle: "middle", "head": "end"})(x)
    assert torch.equal(outputs["end"], model(x))
    assert outputs["middle"].shape[0] == 4
