"""What is measured, what is promised, what is blamed."""

from dataclasses import replace
from math import nan

import pytest
import torch
from torch import nn

from deit import layers as L
from deit.equivariance import randomize_
from deit.groups import OCTIC
from deit.verify.check import Settings, check, gradient_errors
from deit.verify.layers import LAYER_CASES, Call
from deit.verify.mutations import EARLY, HYBRID, LAYERS, MUTATIONS, RESMLP, VIT, wrong_backward
from deit.verify.networks import choose, default_networks, network_case

FLOAT32 = Settings(torch.float32)
# what changes nothing in inference, and what is a layer of ordinary networks alone
PASSIVE = {"Dropout", "DropPath", "FixedBuffers", "MirrorOrder", "MirrorHalves"}
OF_TWINS = {"OrdinaryAffine", "OrdinaryConvBlock", "OrdinaryMixerBlock"}


def failures_of(network: nn.Module) -> list[str]:
    """Of one that `VIT` has built."""
    return check(replace(VIT, trained=network), FLOAT32).failures


def test_every_kind_of_layer_has_a_case_and_is_broken_once():
    """A new layer must get a case and a break, or be named above."""
    named = [kind for name, kind in vars(L).items() if name not in PASSIVE | OF_TWINS]
    kinds = {kind for kind in named if isinstance(kind, type) and issubclass(kind, nn.Module)}
    assert {each.kind for each in MUTATIONS} >= kinds
    built = {type(m) for case in LAYER_CASES for m in case.build().modules()}
    assert built >= kinds - {L.OrdinaryBlock}
    assert {case.name for case in LAYER_CASES if case.group is OCTIC} == {
        "Linear", "Affine", "LayerNorm", "GELU", "Mlp", "Attention", "Block"
    }  # fmt: skip


def test_networks_with_a_promise_and_every_family_among_the_defaults():
    known = choose(["*"])
    assert {"d2_deit_huge_patch14_52_LS", "resmlp_equi_d2_L_24", "d2_convnext_xlarge"} <= {*known}
    assert not any(name.startswith(("deit_", "convnext", "resmlp_1")) for name in known)
    assert choose(["*_tiny", "d2_convnext_tiny"]) == ["d2_convnext_tiny"]
    smallest = {name for name in known if "tiny" in name or "isotropic_small" in name}
    usual, varied = (
        {case.name for case in default_networks() if bool(case.variant) is has_variant}
        for has_variant in (False, True)
    )
    assert usual == varied == {*smallest, "resmlp_equi_d2_12"}


def test_without_pooling_resmlp_has_invariant_entries_that_are_no_places():
    options = {"depth": 1, "global_pool": ""}
    result = check(network_case(RESMLP.name, "", (64, 96), **options), FLOAT32, features_only=True)
    assert result.failures == []


@pytest.mark.parametrize(
    ("case", "promised", "measured", "others"),
    [
        (VIT, True, {"patch_embed.proj_asym", "blocks.1.norm1.scaling", "blocks.1.gamma_1", "norm",
                     "blocks.1.gamma_2", "head", "map of blocks.0", "map of blocks.1"}, set()),
        (HYBRID, False, {"bridge", "blocks.1"}, {"head", "norm", "blocks.2"}),
        (EARLY, True, {"head", "bridge", "blocks.2", "blocks.3.mlp.fc1"}, set()),
    ],
    ids=["ViT", "hybrid", "early"],
)  # fmt: skip
def test_every_layer_inside_is_measured_as_far_as_the_promise(case, promised, measured, others):
    result = check(case, FLOAT32)
    assert result.failures == []
    layers = {event.layer for event in result.events}
    assert measured <= layers
    assert not others & layers
    sides = [event.side for event in result.events if event.layer == ""]
    assert sides == ["into", "out of"][: 1 + promised]
    assert (result.gradient is not None) is result.promised is promised
    assert result.output < result.tolerance if promised else result.output > 0.01


def test_a_block_that_is_never_run_fails_and_checking_leaves_nothing_behind():
    network = randomize_(VIT.build())
    block = network.blocks[1]
    network.blocks[1] = nn.Identity()
    network.blocks[1].inner = block
    before = [{*module.__dict__} for module in network.modules()]
    assert failures_of(network) == ["blocks.1.inner was never measured"]
    assert [{*module.__dict__} for module in network.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_a_layer_that_gives_something_else_than_a_feature_fails():
    """What cannot be measured is not taken for right."""
    network = randomize_(VIT.build())
    original = network.pos_embed.forward
    network.pos_embed.forward = lambda *grid: list(original(*grid))
    assert failures_of(network) == ["pos_embed was never measured"]


def test_gradients_of_networks_are_compared():
    """A backward pass that is wrong in one layer, behind a right forward pass."""
    network = randomize_(VIT.build())
    hook = network.blocks[1].norm1.register_forward_hook
    hook(lambda module, inputs, x: tuple(map(wrong_backward, x)))
    (failure,) = failures_of(network)
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


def test_a_twin_must_be_far_off():
    """Ten times our own error, and two tolerances; NaN is not."""
    case = LAYERS["Linear"]

    def twin():
        return Call(lambda x, linear: torch.cat(linear(x.chunk(2, -1)), -1), case.build())

    result = check(replace(case, build_twin=twin), FLOAT32)
    assert ["ordinary twin is hardly worse" in failure for failure in result.failures] == [True]
    found = replace(result, tolerance=0.01, output=1e-3, twin=0.1)
    assert found.failures == []
    for wrong in ({"output": 0.02}, {"twin": 0.015}, {"twin": nan}):
        assert len(replace(found, **wrong).failures) == 1


@pytest.mark.parametrize(
    ("expected", "found", "error"), [(1, 1, 0.0), (1, 2, 1.0), (1, 0, 1.0), (0, 0, nan)]
)
def test_gradient_errors(expected, found, error):
    """The second gradient is what rounding leaves of none; all may vanish."""
    errors = gradient_errors(
        [torch.full((4,), float(expected)), expected * torch.tensor([1e-9])],
        [torch.full((4,), float(found)), -expected * torch.tensor([1e-9])],
        floor=0.01,
    )
    assert errors.tolist() == pytest.approx([error, error * 0], abs=1e-6, nan_ok=True)
