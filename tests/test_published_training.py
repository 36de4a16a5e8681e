"""Checkpoints that the published code's trainings wrote go on here, with every moment in its place.

Its networks are stood in for by their parameters alone, in the order of registration, which
`fixtures/networks.json` has; its optimizers' groups are written out here once more.
"""

from __future__ import annotations

import copy
import json
import re
from argparse import Namespace
from pathlib import Path

import apex_double
import pytest
import timm
import torch
from timm.models.convnext import checkpoint_filter_fn
from torch import nn
from training_runs import (
    TINY_NETWORKS,
    differences,
    load,
    make_images,
    optimizer_for,
    refused,
    run,
)

import deit.models  # noqa: F401 - registers the networks
from deit.models.published import own_name
from deit.train.checkpoint import Checkpoint, read_checkpoint
from deit.train.engine import Precision
from deit.train.moments import load_optimizer, published_names
from deit.train.optim import freeze_shift
from deit.train.weights import load_weights

FAMILIES = json.loads((Path(__file__).parent / "fixtures" / "networks.json").read_text())[
    "families"
]
# The published networks hold these as parameters without gradients.
FROZEN = ("permutation", "left_idx", "right_idx", "zero_center", "cls_token.1")
KWARGS = TINY_NETWORKS | {
    "convnext_isotropic_large": {"depth": 2, "embed_dim": 8, "layer_scale_init_value": 1e-6}
}


def published_keys(family: str, own: dict[str, torch.Tensor]) -> list[str]:
    """The published keys of a network of this family, of the depth of `own`, in their order."""
    templates, keys = list(FAMILIES[family]), []
    while templates:
        match = re.match(r"(.*\.)([ij])\.", templates[0])
        if match is None:
            keys.append(templates.pop(0))
            continue
        prefix = match.group()
        block = [t for t in templates if t.startswith(prefix)]
        templates = [t for t in templates if t not in block]
        for number in range(10):
            named = [t.replace(prefix, f"{match.group(1)}{number}.", 1) for t in block]
            keys += named if set(named) <= set(own) else []
    assert sorted(keys) == sorted(own), "the stand-in has the keys of the network"
    return keys


# Names of ordinary ConvNeXts, and what ConvNeXt's authors have in their place.
AUTHORS = {
    r"^stem\.": "downsample_layers.0.",
    r"^stages\.(\d)\.downsample\.": r"downsample_layers.\1.",
    r"\.blocks\.": ".",
    r"conv_dw": "dwconv",
    r"mlp\.fc": "pwconv",
    r"^head\.(norm|fc\b)": r"\1",
    r"^fc\b": "head",
}
ORDER = ("stem", "downsample_layers", "stages", "blocks", "norm", "head")


def ordinary_convnext(name: str) -> dict[str, torch.Tensor]:
    """The published parameters of an ordinary ConvNeXt with LayerScale, in their order."""
    state = {}
    for key, value in timm.create_model(name, num_classes=3, **KWARGS[name]).state_dict().items():
        if name == "convnext_tiny":
            for own, published in AUTHORS.items():
                key = re.sub(own, published, key)
        shape = value.shape
        if key.endswith("gamma"):
            shape = (1, *shape, 1, 1)
        elif "pwconv" in key and value.ndim == 2:
            shape = (*shape, 1, 1)
        state[key] = torch.randn(shape)
    return {key: state[key] for key in sorted(state, key=lambda k: ORDER.index(k.split(".")[0]))}


def published_parameters(name: str, prefix: str = "") -> dict[str, nn.Parameter]:
    """What `named_parameters` of the published network gives, with random values."""
    if name in ("convnext_tiny", "convnext_isotropic_large"):
        return {prefix + k: nn.Parameter(v) for k, v in ordinary_convnext(name).items()}
    own = timm.create_model(name, num_classes=3, **KWARGS[name]).state_dict()
    parameters = {}
    for key in published_keys(re.sub("_(tiny|small)(_patch16_LS)?$|_12$", "", name), own):
        fixed = key.endswith(FROZEN)
        value = own[key] if fixed else torch.randn(own[key].shape)
        parameters[prefix + key] = nn.Parameter(value.clone(), requires_grad=not fixed)
    return parameters


def published_groups(parameters, decay, exceptions, free_first):
    """`param_groups_weight_decay` of timm 1.0.12, `get_parameter_groups` of ConvNeXt's authors.

    The first puts those without decay first, the second the kind that comes first.
    """
    groups = {True: [], False: []} if free_first else {}
    for name, p in parameters.items():
        if p.requires_grad:
            free = p.ndim <= 1 or name.endswith(".bias") or name in exceptions
            groups.setdefault(free, []).append(p)
    return [{"params": g, "weight_decay": 0.0 if f else decay} for f, g in groups.items()]


def never_used(name: str) -> bool:
    return name.endswith(("beta_sym", "beta_asym"))


def gradients(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(parameters, key=lambda n: n.removeprefix("_orig_mod.")):
        p = parameters[name]
        if p.requires_grad and not never_used(name):
            # by numbers of values, as shapes may have axes of length 1 more
            p.grad = torch.randn(p.numel(), generator=generator).reshape(p.shape)


def train_published(parameters, optimizer, seeds) -> None:
    for seed in seeds:
        gradients(parameters, seed)
        optimizer.step()
        for p in parameters.values():
            p.grad = None


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-8),
    "fusedlamb": lambda groups: apex_double.FusedLAMB(groups, lr=0.01, eps=1e-8),
    "lamb": lambda groups: timm.optim.Lamb(groups, lr=0.01, eps=1e-8),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
}
VIT = {"pos_embed", "cls_token"}
CASES = [
    # network, prefix of compiled names, the list of exceptions, optimizer, shifts are frozen
    ("d2_deit_tiny_patch16_LS", "_orig_mod.", VIT, "fusedlamb", False),
    ("d2_deit_tiny_patch16_LS", "", VIT, "adamw", False),
    ("d2_deit_tiny_patch16_LS", "", {"pos_embed.0", "pos_embed.1", "cls_token.0"}, "adamw", False),
    ("hybrid_deit_tiny_patch16_LS", "_orig_mod.", {"pos_embed"}, "lamb", False),
    ("deit_tiny_patch16_LS", "_orig_mod.", VIT, "fusedlamb", False),
    ("deit_tiny_patch16_LS", "", VIT, "sgd", True),
    ("resmlp_equi_d2_12", "", set(), "fusedlamb", False),
    ("resmlp_equi_d2_12", "", set(), "fusedlamb", True),
    ("resmlp_equi_d2_12", "_orig_mod.", set(), "adamw", False),
    ("resmlp_equi_d2_12", "_orig_mod.", set(), "adamw", True),
    ("resmlp_12", "", set(), "fusedlamb", False),
    ("d2_convnext_isotropic_small", "_orig_mod.", set(), "adamw", False),
    ("d2_convnext_tiny", "", set(), "adamw", False),
    ("convnext_isotropic_small", "", set(), "adamw", False),
    ("convnext_isotropic_large", "_orig_mod.", set(), "adamw", False),
    ("convnext_tiny", "", set(), "adamw", False),
]


@pytest.mark.parametrize(("name", "prefix", "exceptions", "opt", "frozen"), CASES)
def test_training_goes_on_with_the_published_updates(name, prefix, exceptions, opt, frozen):
    """After two updates there, the third and the fourth are the same on both sides."""
    torch.manual_seed(0)
    theirs = published_parameters(name, prefix)
    groups = published_groups(theirs, 0.1, exceptions, free_first="convnext" not in name)
    optimizer = OPTIMIZERS[opt](groups)
    train_published(theirs, optimizer, (1, 2))
    state = {key: p.detach().clone() for key, p in theirs.items()}
    saved = copy.deepcopy(optimizer.state_dict())
    train_published(theirs, optimizer, (3, 4))

    model = timm.create_model(name, num_classes=3, **KWARGS[name])
    load_weights(model, Checkpoint({"model": state}, "published.pth"))
    if frozen:
        freeze_shift(model)
    compiled = prefix != "" or "convnext" in name or ("cls_token" in exceptions and "d2" in name)
    ours = optimizer_for(model, opt=opt, lr=0.01, weight_decay=0.1, decay_as_compiled=compiled)
    if opt == "sgd":
        ours.param_groups[0]["nesterov"] = ours.param_groups[1]["nesterov"] = True
    names = published_names(model, state, saved, "published.pth")
    assert load_optimizer(model, ours, saved, "published.pth", names) == []
    published = {own_name(model, key.removeprefix(prefix)): key for key in theirs}
    own = dict(model.named_parameters())
    train_published(
        {key: own[name] for name, key in published.items() if name in own}, ours, (3, 4)
    )
    for name, value in model.state_dict().items():
        key = published[name]
        reference = theirs[key].detach()
        torch.testing.assert_close(
            value, reference.reshape(value.shape), rtol=1e-5, atol=1e-6, msg=key
        )
        moved = (reference - state[key]).abs().max()
        assert (moved > 1e-4) == (not key.endswith(FROZEN) and not never_used(key)), key


@pytest.mark.parametrize("name", ["convnext_tiny", "convnext_isotropic_large"])
def test_published_ordinary_convnexts_load(name, tmp_path):
    """By resuming, for fine-tuning and by timm."""
    state = ordinary_convnext(name)

    def build(**kwargs):
        return timm.create_model(name, num_classes=3, **KWARGS[name], **kwargs)

    tiny, shapes = name == "convnext_tiny", build().state_dict()
    named = checkpoint_filter_fn(state, build()) if tiny else state  # timm's own translation
    expected = {key: named[key].reshape(value.shape) for key, value in shapes.items()}
    assert len(named) == len(expected)
    average = {key: value * 0 for key, value in state.items()}
    torch.save({"model": state, "model_ema": average}, tmp_path / "p.pth")
    resumed, tuned = build(), build()
    checkpoint = read_checkpoint(tmp_path / "p.pth")
    load_weights(resumed, checkpoint)
    report = load_weights(tuned, checkpoint, adapt=True)
    assert report.missing == report.unexpected == report.reinitialised == []
    torch.save(state, tmp_path / "bare.pth")
    overlay = {"file": str(tmp_path / "bare.pth"), "num_classes": 3}
    models = [resumed, tuned]
    if not tiny:  # timm has a filter of its own for those
        models.append(build(pretrained=True, pretrained_cfg_overlay=overlay))
        models.append(build(checkpoint_path=str(tmp_path / "bare.pth")))
    for model in models:
        torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data"))


ARGS = Namespace(model="d2_deit_tiny_patch16_LS", opt="fusedlamb", lr=1e-3, epochs=3, gpu=0)
RUN = ("--model-kwargs", "depth=2", "--mixup", "0", "--cutmix", "0", "--epochs", "3")
# What the learning rate and the decay were.
AS_PUBLISHED = ("--weight-decay", "0.1", "--decay-as-compiled")


def save_published(path, name, *, layout, opt, prefix="", epoch=0):
    """A file as DeiT's, ConvNeXt's or timm's script writes it after an epoch of three updates."""
    torch.manual_seed(0)
    theirs = published_parameters(name, prefix)
    groups = published_groups(theirs, 0.1, VIT, free_first=layout != "convnext")
    optimizer = OPTIMIZERS[opt](groups)
    train_published(theirs, optimizer, (1, 2, 3))
    state = {key: p.detach().clone() for key, p in theirs.items()}
    average = {k: v / 2 if v.is_floating_point() else v for k, v in state.items()}
    checkpoint = {
        "model": state,
        "model_ema": average,
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "scaler": {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5,
                   "growth_interval": 2000, "_growth_tracker": 7},
        "args": Namespace(**(vars(ARGS) | {"model": name, "opt": opt})),
    }  # fmt: skip
    if layout == "deit":
        checkpoint["lr_scheduler"] = {"t_initial": 3, "warmup_t": 5, "base_values": [9.0, 9.0]}
    names = {"model": "state_dict", "model_ema": "state_dict_ema", "scaler": "amp_scaler"}
    renamed = names if layout == "timm" else {}
    torch.save({renamed.get(key, key): value for key, value in checkpoint.items()}, path)
    moments = {key: optimizer.state[p] for key, p in theirs.items() if p in optimizer.state}
    return checkpoint, moments


@pytest.mark.parametrize(
    ("layout", "name", "opt", "prefix"),
    [
        ("timm", "resmlp_12", "adamw", ""),
        ("deit", "d2_deit_tiny_patch16_LS", "fusedlamb", "_orig_mod."),
        ("convnext", "d2_convnext_isotropic_small", "adamw", "_orig_mod."),
    ],
)
def test_a_published_file_is_gone_on_with(layout, name, opt, prefix, data, tmp_path, monkeypatch):
    """Weights, average, moments, scaler, epoch: only the random states are left to tell."""
    path = tmp_path / "published.pth"
    theirs, moments = save_published(path, name, layout=layout, opt=opt, prefix=prefix)
    # Nothing is trained: what is saved is what was read.
    monkeypatch.setattr("deit.main.train", lambda run: run.save(["checkpoint.pth"]))
    half = classmethod(lambda cls, device, *_: cls(device, torch.float16))
    monkeypatch.setattr(Precision, "choose", half)
    course = () if layout == "timm" else ("--sched-as-published", layout)
    options = (*AS_PUBLISHED, *course, "--model", name, "--opt", opt, "--resume", path)
    told = run(*RUN, *options, data=data, out=tmp_path / "out")
    assert not re.search("moments|--decay-as-compiled|--sched-as-published", told)
    assert "no states of random generators" in told
    assert ("note    --opt fusedlamb is timm's Lamb, " in told) == (opt == "fusedlamb")
    ours = load(tmp_path / "out" / "checkpoint.pth")
    assert (ours["epoch"], ours["lr_scheduler"]["updates"]) == (0, 6)
    assert ours["scaler"] == theirs["scaler"]
    for key in ("model", "model_ema"):
        named = {prefix + name: value for name, value in ours[key].items()}
        assert differences(named, theirs[key]) == []
    state, groups = ours["optimizer"]["state"], ours["optimizer"]["param_groups"]
    assert {int(group.get("step", 3)) for group in groups} == {3}
    assert len(state) == len(moments)
    where = {prefix + name: n for n, name in enumerate(ours["parameters"])}
    for name, saved in moments.items():
        for key, value in saved.items():
            assert torch.equal(state[where[name]][key].reshape(value.shape), value), (name, key)


def test_what_a_published_run_did_otherwise_is_told(data, tmp_path):
    name, path = "d2_deit_tiny_patch16_LS", tmp_path / "published.pth"
    save_published(path, name, layout="deit", opt="fusedlamb", prefix="_orig_mod.")
    options = ("--opt", "lamb", "--weight-decay", "0.1", "--no-model-ema", "--lr", "5e-4")
    told = run("--model", name, *RUN, *options, "--resume", path, data=data, out=tmp_path / "out")
    for words in (
        "weight decay on cls_token.0, pos_embed.0, pos_embed.1: --decay-as-compiled",
        "--sched-as-published deit",
        "average (model_ema) is dropped",
        "--lr is 0.0005, it was 0.001",
    ):
        assert words in told
    assert not re.search("--opt is|--gpu", told), "lamb and fusedlamb are one optimizer"
    assert load(tmp_path / "out" / "checkpoint.pth")["epoch"] == 2


def test_weights_alone_where_the_moments_cannot_be_placed(data, tmp_path):
    name, path, out = "d2_convnext_isotropic_small", tmp_path / "published.pth", tmp_path / "out"
    checkpoint, _ = save_published(path, name, layout="convnext", opt="adamw", epoch="best")
    argv = ("--model", name, *RUN, "--resume", path)
    wanted = "epoch is 'best'): give the one to go on with by --start-epoch"
    assert wanted in refused(*argv, data=data)
    groups = checkpoint["optimizer"]["param_groups"]
    groups[0]["params"].append(groups[1]["params"].pop())
    torch.save(checkpoint | {"epoch": 1}, path)
    error = refused(*argv, data=data)
    assert re.search("cannot be told apart.*--resume-weights-only", error)
    told = run(*argv, "--resume-weights-only", data=data, out=out)
    assert "the optimizer's moments start at zero" in told
    ours = load(out / "checkpoint.pth")
    assert ours["epoch"] == 2
    assert {int(state["step"]) for state in ours["optimizer"]["state"].values()} == {6}
