"""Which parameters decay, how fast layers learn, which implementation is built."""

import logging
import sys
import types

import pytest
import timm
import timm.optim
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from deit import optim
from deit.errors import UserError
from deit.lamb import Lamb
from deit.optim import build_optimizer, decays, named_parameters, parameter_groups, scaled_lr


def tiny_vit(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, **kwargs)


class Pair(nn.Module):
    """The parameter shapes and names of an equivariant network."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.ParameterList([torch.ones(1, 4, 6), torch.ones(1, 4, 6)])
        self.cls_token = nn.ParameterList([torch.ones(1, 1, 6)])
        self.linear_sym = nn.Linear(6, 6)
        self.alpha = nn.Parameter(torch.ones(1, 1, 6))
        self.gamma = nn.Parameter(torch.ones(6))
        self.attn_mixer = nn.Parameter(torch.ones(2))
        self.bias = nn.Parameter(torch.ones(2, 3))
        self.odd = nn.Linear(6, 1, bias=False)
        self.special = nn.Linear(3, 3, bias=False)
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)

    def no_weight_decay(self):
        return {"special"}


def names_with_decay(model, **kwargs):
    names = {id(p): name for name, p in named_parameters(model)}
    groups = parameter_groups(model, weight_decay=0.1, **kwargs)
    assert {g["weight_decay"] for g in groups} <= {0.0, 0.1}
    assert all(g["wd_scale"] == (g["weight_decay"] > 0) for g in groups)
    every = [id(p) for g in groups for p in g["params"]]
    assert len(every) == len(set(every))
    assert set(every) == {id(p) for p in model.parameters() if p.requires_grad}
    return {names[id(p)] for g in groups for p in g["params"] if g["weight_decay"]}


def test_only_maps_decay():
    assert names_with_decay(Pair()) == {"linear_sym.weight", "odd.weight"}


def test_same_choice_as_timm_on_its_vit():
    model = tiny_vit(class_token=True, init_values=1e-5)
    theirs = timm.optim.param_groups_weight_decay(
        model, 0.1, no_weight_decay_list=model.no_weight_decay()
    )
    decayed = {id(p) for g in theirs for p in g["params"] if g["weight_decay"]}
    ours = names_with_decay(model)
    assert ours == {name for name, p in model.named_parameters() if id(p) in decayed}
    assert "head.weight" in ours
    assert "pos_embed" not in ours


def wrap_whole(model):
    return torch.compile(model)


def wrap_blocks(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block)
    return model


@pytest.mark.parametrize("wrap", [wrap_whole, wrap_blocks])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_compiled_or_not(wrap, layer_decay):
    def sizes(model):
        groups = parameter_groups(model, 0.1, layer_decay)
        return [(g["weight_decay"], g["lr_scale"], len(g["params"])) for g in groups]

    plain, compiled = tiny_vit(), wrap(tiny_vit())
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    assert names_with_decay(plain) == names_with_decay(compiled)
    assert sizes(plain) == sizes(compiled)


def test_layer_decay_is_timms():
    model = tiny_vit()
    theirs = param_groups_layer_decay(model, 0.1, model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in theirs for p in g["params"]}
    ours = parameter_groups(model, 0.1, layer_decay=0.5)
    assert all(g["lr_scale"] == scale[id(p)] for g in ours for p in g["params"])
    assert sorted({g["lr_scale"] for g in ours}) == [0.125, 0.25, 0.5, 1.0]
    with pytest.raises(UserError, match="group_matcher"):
        parameter_groups(Pair(), 0.1, layer_decay=0.5)


def test_wildcards_and_modules_can_be_exempt():
    weight = torch.ones(2, 3)
    assert decays("blocks.0.attn.weight", weight)
    assert not decays("blocks.0.attn.weight", weight, {"blocks.*.attn.weight"})
    assert not decays("blocks.0.attn.weight", weight, {"blocks.0.attn"})
    assert decays("blocks.0.attn_out.weight", weight, {"blocks.0.attn"})


def test_learning_rate_rule():
    assert scaled_lr(5e-4, 4096) == pytest.approx(4e-3)
    assert scaled_lr(5e-4, 512) == 5e-4


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lion", "muon", "adafactor", "lookahead_adamw"])
def test_timms_optimizers_train(opt):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = [p.clone() for p in model.parameters()]
    optimizer = build_optimizer(model, opt=opt, lr=0.1, weight_decay=0.1, eps=1e-8)
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    assert all((a != b).any() for a, b in zip(before, model.parameters(), strict=True))


def test_settings_reach_the_optimizer():
    model = nn.Linear(3, 4)
    adamw = build_optimizer(
        model, opt="adamw", lr=0.1, weight_decay=0.2, eps=1e-5, betas=[0.8, 0.9]
    )
    assert {g["weight_decay"] for g in adamw.param_groups} == {0.0, 0.2}
    assert all(g["eps"] == 1e-5 for g in adamw.param_groups)
    assert all(tuple(g["betas"]) == (0.8, 0.9) for g in adamw.param_groups)
    sgd = build_optimizer(model, opt="momentum", lr=0.1, momentum=0.7, eps=1e-8)
    assert all(g["momentum"] == 0.7 for g in sgd.param_groups)
    lamb = build_optimizer(model, opt="lamb", lr=0.1, eps=1e-8)
    assert all(g["eps"] == 1e-8 and g["betas"] == (0.9, 0.999) for g in lamb.param_groups)


@pytest.mark.parametrize("opt", ["lamb", "fusedlamb", "FusedLAMB"])
def test_lamb_is_ours_without_a_gpu(opt, caplog):
    with caplog.at_level(logging.INFO):
        assert type(build_optimizer(nn.Linear(3, 4), opt=opt, lr=0.1)) is Lamb
    assert "own implementation" in caplog.text


def test_fusedlamb_is_apexs_where_it_is_installed(monkeypatch, caplog):
    """apex and a GPU are stood in for; the point is who is asked, with what, and what if not."""

    class FusedLAMB(torch.optim.SGD):
        def __init__(self, params, lr, weight_decay, eps):
            super().__init__(params, lr=lr, weight_decay=weight_decay)
            self.eps = eps

    class Broken:
        def __init__(self, *args, **kwargs):
            raise RuntimeError("apex.optimizers.FusedLAMB requires cuda extensions")

    apex = types.SimpleNamespace(FusedLAMB=FusedLAMB)
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    groups = optim.parameter_groups(nn.Linear(3, 4), 0.1)
    monkeypatch.setattr(optim, "_on_one_gpu", lambda groups: True)
    settings = {"lr": 0.1, "weight_decay": 0.1, "eps": 1e-8}
    with caplog.at_level(logging.INFO):
        assert type(optim._build_lamb(groups, settings, fused=True)) is FusedLAMB
        assert "apex's FusedLAMB" in caplog.text
        assert type(optim._build_lamb(groups, settings, fused=False)) is Lamb
        apex.FusedLAMB = Broken
        assert type(optim._build_lamb(groups, settings, fused=True)) is Lamb
    assert "requires cuda extensions" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"opt": "adamww"}, r"unknown optimizer 'adamww'; did you mean .*adamw"),
        ({"opt": "fusedadam"}, r"'fusedadam' cannot be built: .*(CUDA|apex)"),
        ({"opt": "adan", "betas": [0.9, 0.99]}, "'adan' takes 3 betas, got 2"),
        ({"opt": "lamb", "betas": [0.9, 1.5]}, "'lamb' cannot be built: betas must be two"),
    ],
)
def test_what_cannot_be_built_is_one_clear_error(settings, words):
    with pytest.raises(UserError, match=words):
        build_optimizer(nn.Linear(3, 4), lr=0.1, **settings)


def test_nothing_to_train():
    with pytest.raises(UserError, match="no trainable parameter"):
        build_optimizer(nn.Linear(3, 4).requires_grad_(False), lr=0.1)
