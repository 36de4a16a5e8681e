"""Whole networks: what is measured, what is promised, what is blamed."""

import timm
import torch
from torch import nn

import deit.models  # noqa: F401 - registers the networks
from deit import layers as L
from deit.equivariance import randomize_
from deit.verify.breaks import BREAKS, EARLY, HYBRID, INTACT, VIT
from deit.verify.networks import DEFAULT, check_network, choose, known_networks
from deit.verify.settings import Settings
from deit.verify.trace import ON_LAST_AXIS, ON_MAPS, ORDINARY, Trace

FLOAT32 = Settings(torch.float32)
SPECIAL = (L.PatchEmbed, L.PositionEmbedding, L.PrefixToken, L.RegularBridge, L.InvariantBridge)
# layers without arithmetic of their own, and those whose work is seen in the layer around them
UNSEEN = {"Dropout", "Identity", "DropPath", "Sequential", "ModuleList", "GELU", "MirrorKernel",
          "MirrorOrder", "MirrorHalves"}  # fmt: skip


def test_every_kind_of_layer_is_known():
    """A new layer must be given its place in the tables, or be named here."""
    known = (*ON_LAST_AXIS, *ON_MAPS, *SPECIAL, *ORDINARY)
    for network in _networks():
        inside_linear = {
            block for m in network.modules() if isinstance(m, L.Linear) for block in m.children()
        }
        unknown = {
            type(module).__name__
            for module in set(network.modules()) - inside_linear - {network}
            if not isinstance(module, known)
        }
        assert unknown <= UNSEEN, type(network)


def _networks() -> list[nn.Module]:
    with torch.device("meta"):
        return [case.build() for case in DEFAULT]


def test_every_kind_of_layer_is_broken_once():
    broken = {each.kind for each in BREAKS}
    assert broken >= {*ON_LAST_AXIS, *ON_MAPS, *SPECIAL}


def test_every_family_is_among_the_defaults():
    families = {name.rsplit("_LS", 1)[0].split("_tiny")[0].split("_small")[0] for name in
                known_networks() if "tiny" in name or "isotropic_small" in name}  # fmt: skip
    for family in (*families, "resmlp_equi_d2_12"):
        assert any(case.name.startswith(family) for case in DEFAULT), family


def test_known_networks_are_those_with_a_promise():
    known = known_networks()
    assert {"d2_deit_huge_patch14_52_LS", "resmlp_equi_d2_L_24", "d2_convnext_xlarge"} <= {*known}
    assert not any(name.startswith(("deit_", "convnext", "resmlp_1")) for name in known)
    assert choose(["*_tiny", "d2_convnext_tiny"]) == ["d2_convnext_tiny"]


def test_every_block_is_measured_inside():
    result = check_network(VIT, FLOAT32)
    assert result.failures == []
    layers = {event.layer for event in result.events}
    inside = {"norm1", "norm1.scaling", "attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc1",
              "mlp.act", "mlp.fc2", "norm2"}  # fmt: skip
    assert {f"blocks.1.{name}" for name in inside} <= layers
    assert {"", "patch_embed", "pos_embed", "cls_token", "norm", "head"} <= layers
    assert {"map of blocks.0", "map of blocks.1"} <= layers


def test_a_hybrid_is_held_to_its_promise_alone():
    result = check_network(HYBRID, FLOAT32)
    layers = {event.layer for event in result.events}
    assert {"bridge", "blocks.1"} <= layers
    assert not {"head", "norm", "blocks.2"} & layers
    assert [event.side for event in result.events if event.layer == ""] == ["into"]
    assert result.failures == []
    assert not result.invariant
    assert result.gradient is None
    assert result.logits > 0.01


def test_an_invariant_early_network_is_held_to_the_end():
    result = check_network(EARLY, FLOAT32)
    assert {"", "head", "bridge", "blocks.2", "blocks.3.mlp.fc1"} <= {
        e.layer for e in result.events
    }
    assert result.invariant
    assert result.failures == []
    assert result.logits < FLOAT32.tolerance()


def test_tracing_leaves_nothing_behind():
    for case in INTACT:
        network = randomize_(case.build())
        before = [dict(module.__dict__) for module in network.modules()]
        images = torch.randn(4, 3, *case.img_size)
        with torch.no_grad(), Trace(network):
            network(images)
        for module, attributes in zip(network.modules(), before, strict=True):
            assert module.__dict__.keys() == attributes.keys()
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def test_an_ordinary_network_in_disguise_fails():
    """A network whose class promises equivariance, with ordinary patches."""
    network = randomize_(VIT.build())
    patches = nn.Conv2d(3, 192, 16, 16)
    network.patch_embed.forward = lambda x: patches(x).flatten(2).mT
    result = check_network(VIT, FLOAT32, network)
    assert result.failures
    assert result.culprit.layer == "patch_embed"
    assert result.logits > 1000 * FLOAT32.tolerance()


def test_a_block_that_is_never_run_fails():
    network = randomize_(VIT.build())
    block = network.blocks[1]
    network.blocks[1] = nn.Identity()
    network.blocks[1].inner = block
    failures = check_network(VIT, FLOAT32, network).failures
    assert failures == ["blocks.1.inner was never measured"]


def test_gradients_are_compared():
    """A backward pass that is wrong in one layer, behind a right forward pass."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.view_as(x)

        @staticmethod
        def backward(context, gradient):
            return gradient + 0.1 * gradient.abs()

    network = randomize_(VIT.build())
    norm = network.blocks[1].norm1
    original = norm.forward
    norm.forward = lambda x: Wrong.apply(original(x))
    (failure,) = check_network(VIT, FLOAT32, network).failures
    assert failure.startswith("gradients")


def test_twins_exist():
    for name in known_networks():
        from deit.complexity.published import twin_of

        assert timm.is_model(twin_of(name)), name
