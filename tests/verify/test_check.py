"""What is measured, what is promised, what is blamed."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from deit import layers as L
from deit.equivariance import randomize_
from deit.groups import OCTIC
from deit.models.published import twin_of
from deit.verify.case import Settings
from deit.verify.check import check, gradient_errors, is_far_off
from deit.verify.layers import LAYER_CASES, Call
from deit.verify.mutations import EARLY, HYBRID, LAYERS, MUTATIONS, VIT, wrong_backward
from deit.verify.networks import choose, default_networks, known_networks
from deit.verify.rules import Rules, swap
from deit.verify.trace import trace

FLOAT32 = Settings(torch.float32)
# what changes nothing in inference, and what is a layer of ordinary networks alone
PASSIVE = {"Dropout", "DropPath", "FixedBuffers", "MirrorOrder", "MirrorHalves"}
OF_TWINS = {"OrdinaryAffine", "OrdinaryConvBlock", "OrdinaryMixerBlock"}


def test_every_kind_of_layer_has_a_case_and_is_broken_once():
    """A new layer must get a case and a break, or be named above."""
    named = {kind for name, kind in vars(L).items() if name not in PASSIVE | OF_TWINS}
    kinds = {kind for kind in named if isinstance(kind, type) and issubclass(kind, nn.Module)}
    assert {each.kind for each in MUTATIONS} >= kinds
    built = {type(m) for case in LAYER_CASES for m in case.build().modules()}
    assert built >= kinds - {L.OrdinaryBlock}
    assert {case.name for case in LAYER_CASES if case.group is OCTIC} == {
        "Linear", "Affine", "LayerNorm", "GELU", "Mlp", "Attention", "Block"
    }  # fmt: skip


def test_known_networks_are_those_with_a_promise_and_a_twin():
    known = known_networks()
    assert {"d2_deit_huge_patch14_52_LS", "resmlp_equi_d2_L_24", "d2_convnext_xlarge"} <= {*known}
    assert not any(name.startswith(("deit_", "convnext", "resmlp_1")) for name in known)
    assert choose(["*_tiny", "d2_convnext_tiny"]) == ["d2_convnext_tiny"]
    assert all(timm.is_model(twin_of(name)) for name in known)


def test_every_family_is_among_the_defaults():
    families = {name.rsplit("_LS", 1)[0].split("_tiny")[0].split("_small")[0] for name in
                known_networks() if "tiny" in name or "isotropic_small" in name}  # fmt: skip
    for family in (*families, "resmlp_equi_d2_12"):
        assert any(case.name.startswith(family) for case in default_networks()), family


def test_every_layer_is_measured_inside():
    result = check(VIT, FLOAT32)
    assert result.failures == []
    layers = {event.layer for event in result.events}
    inside = {"norm1", "norm1.scaling", "attn", "attn.qkv", "attn.proj", "gamma_1", "norm2", "mlp",
              "mlp.fc1", "mlp.act", "mlp.fc2", "gamma_2"}  # fmt: skip
    assert {f"blocks.1.{name}" for name in inside} <= layers
    assert {"", "patch_embed", "patch_embed.proj_asym", "pos_embed", "cls_token", "norm"} <= layers
    assert {"head", "map of blocks.0", "map of blocks.1"} <= layers


@pytest.mark.parametrize(
    ("case", "promised", "measured", "others"),
    [
        (HYBRID, False, {"bridge", "blocks.1"}, {"head", "norm", "blocks.2"}),
        (EARLY, True, {"head", "bridge", "blocks.2", "blocks.3.mlp.fc1"}, set()),
    ],
    ids=["hybrid", "early"],
)
def test_a_network_with_a_bridge_is_held_to_its_promise_alone(case, promised, measured, others):
    result = check(case, FLOAT32)
    assert result.failures == []
    layers = {event.layer for event in result.events}
    assert measured <= layers
    assert not others & layers
    sides = [event.side for event in result.events if event.layer == ""]
    assert sides == ["into", "out of"][: 1 + promised]
    assert result.promised is promised
    assert (result.gradient is not None) is promised
    assert result.output < FLOAT32.tolerance() if promised else result.output > 0.01


def test_tracing_leaves_nothing_behind():
    network = randomize_(VIT.build())
    before = [dict(module.__dict__) for module in network.modules()]
    with torch.no_grad():
        _, events, _ = trace(network, Rules(network, VIT.size), torch.randn(4, 3, 64, 96))
    assert events
    for module, attributes in zip(network.modules(), before, strict=True):
        assert module.__dict__.keys() == attributes.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_block_that_is_never_run_fails():
    network = randomize_(VIT.build())
    block = network.blocks[1]
    network.blocks[1] = nn.Identity()
    network.blocks[1].inner = block
    assert check(VIT, FLOAT32, network).failures == ["blocks.1.inner was never measured"]


def test_gradients_of_networks_are_compared():
    """A backward pass that is wrong in one layer, behind a right forward pass."""
    network = randomize_(VIT.build())
    norm = network.blocks[1].norm1
    norm.register_forward_hook(lambda module, inputs, x: tuple(map(wrong_backward, x)))
    (failure,) = check(VIT, FLOAT32, network).failures
    assert failure.startswith("gradients")


def test_all_layers_of_a_kind_wrong_at_once_blame_the_first(monkeypatch):
    original = L.Linear.forward
    monkeypatch.setattr(L.Linear, "forward", lambda self, x: original(self, x[::-1]))
    assert check(VIT, FLOAT32, features_only=True).culprit.culprit == "blocks.0.attn.qkv"


def test_an_error_in_half_precision_alone_is_found_there_alone(monkeypatch):
    original = L.GELU.forward

    def wrong(self, x):
        s, a = original(self, x)
        return s, a + 0.5 if a.dtype == torch.bfloat16 else a

    monkeypatch.setattr(L.GELU, "forward", wrong)
    assert check(LAYERS["GELU"], FLOAT32).failures == []
    assert check(LAYERS["GELU"], Settings(torch.bfloat16)).failures != []


def test_a_twin_that_is_equivariant_itself_fails():
    case = LAYERS["Linear"]

    def twin():
        return Call(lambda x, linear: torch.cat(linear(x.chunk(2, -1)), -1), case.build())

    (failure,) = check(replace(case, build_twin=twin), FLOAT32).failures
    assert "ordinary twin is hardly worse" in failure


@pytest.mark.parametrize(
    ("twin", "own", "expected"),
    [(0.1, 1e-3, True), (0.1, 0.02, False), (0.015, 0.0, False), (float("nan"), 0.0, False)],
)
def test_a_twin_must_be_far_off(twin, own, expected):
    assert is_far_off(twin, own, tol=0.01) is expected


@pytest.mark.parametrize(
    ("expected", "found", "error"),
    [(1, 1, 0.0), (1, 2, 1.0), (1, 0, 1.0), (0, 0, float("nan"))],  # all vanish
)
def test_gradient_errors(expected, found, error):
    """The second gradient is what rounding leaves of none."""
    small = torch.tensor([1e-9])
    errors = gradient_errors(
        {"a": torch.full((4,), float(expected)), "b": expected * small},
        {"a": torch.full((4,), float(found)), "b": -expected * small},
        floor=0.01,
    )
    assert errors == pytest.approx({"a": error, "b": error * 0}, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("prefix", [0, 2])
def test_token_swap_agrees_with_flipping_the_grid(width, prefix):
    """The check's own token order, against the definition: left half, middle, right mirrored."""
    place, half = torch.arange(3 * width).view(3, width) + prefix, width // 2
    order = [place[:, :half], place[:, half : width - half], place[:, width - half :].flip(1)]
    order = torch.cat([part.flatten() for part in order])
    everywhere = torch.cat([torch.arange(prefix), place.flip(1).flatten()])
    mirrored = torch.cat([torch.arange(prefix), everywhere[order]])
    tokens = torch.cat([torch.arange(prefix), order])
    assert torch.equal(swap(3, width, prefix)(1, tokens[None])[0], mirrored)
