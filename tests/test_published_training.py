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
import torch.nn.functional as F
from torch import nn
from training_runs import TINY_NETWORKS, load, make_images, optimizer_for, train

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
DEPTHS, DIMS = TINY_NETWORKS["convnext_tiny"].values()
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


def convnext_shapes(hierarchical: bool) -> dict[str, tuple[int, ...]]:
    """The published parameters of an ordinary ConvNeXt with LayerScale, in their order."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name: str, width: int) -> None:
        shapes[f"{name}.gamma"] = (1, width, 1, 1)
        add(f"{name}.dwconv", width, 1, 7, 7)
        add(f"{name}.norm", width)
        add(f"{name}.pwconv1", 4 * width, width, 1, 1)
        add(f"{name}.pwconv2", width, 4 * width, 1, 1)

    if hierarchical:
        add("downsample_layers.0.0", DIMS[0], 3, 4, 4)
        add("downsample_layers.0.1", DIMS[0])
        for i in (1, 2, 3):
            add(f"downsample_layers.{i}.0", DIMS[i - 1])
            add(f"downsample_layers.{i}.1", DIMS[i], DIMS[i - 1], 2, 2)
        for i, depth in enumerate(DEPTHS):
            for j in range(depth):
                block(f"stages.{i}.{j}", DIMS[i])
    else:
        add("stem", 8, 3, 16, 16)
        for j in range(2):
            block(f"blocks.{j}", 8)
    width = DIMS[-1] if hierarchical else 8
    add("norm", width)
    add("head", 3, width)
    return shapes


def ordinary_convnext(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The published network: its blocks work on (B, C, H, W), its norms on the last axis."""

    def norm(x, name):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, 1e-6).movedim(-1, 1)

    def conv(x, name, **kwargs):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **kwargs)

    def block(x, name):
        y = norm(conv(x, f"{name}.dwconv", padding=3, groups=x.shape[1]), f"{name}.norm")
        y = conv(F.gelu(conv(y, f"{name}.pwconv1")), f"{name}.pwconv2")
        return x + state[f"{name}.gamma"] * y

    if "stem.weight" in state:
        x = conv(x, "stem", stride=16)
        for j in range(2):
            x = block(x, f"blocks.{j}")
    else:
        x = norm(conv(x, "downsample_layers.0.0", stride=4), "downsample_layers.0.1")
        for i, depth in enumerate(DEPTHS):
            if i > 0:
                x = norm(x, f"downsample_layers.{i}.0")
                x = conv(x, f"downsample_layers.{i}.1", stride=2)
            for j in range(depth):
                x = block(x, f"stages.{i}.{j}")
    x = norm(x.mean((2, 3)), "norm")
    return F.linear(x, state["head.weight"], state["head.bias"])


def published_parameters(name: str, prefix: str = "") -> dict[str, nn.Parameter]:
    """What `named_parameters` of the published network gives, with random values."""
    if name in ("convnext_tiny", "convnext_isotropic_large"):
        shapes = convnext_shapes(hierarchical=name == "convnext_tiny")
        values = {key: torch.randn(shape) for key, shape in shapes.items()}
        return {prefix + key: nn.Parameter(value) for key, value in values.items()}
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
    """By resuming, for fine-tuning and by timm; with the same logits."""
    torch.manual_seed(0)
    state = {key: p.detach() * 0.3 for key, p in published_parameters(name).items()}
    if name == "convnext_tiny":
        whole = timm.create_model(name).state_dict()
        assert len(whole) == 182 == len(state) + 9 * (18 - sum(DEPTHS))
    images = torch.randn(2, 3, 64, 64)
    expected = ordinary_convnext(state, images)
    assert expected.std() > 0.01

    def build(**kwargs):
        torch.manual_seed(1)
        return timm.create_model(name, num_classes=3, **KWARGS[name], **kwargs).eval()

    torch.save(
        {"model": state, "model_ema": {k: v * 0 for k, v in state.items()}}, tmp_path / "p.pth"
    )
    resumed, tuned = build(), build()
    checkpoint = read_checkpoint(tmp_path / "p.pth")
    load_weights(resumed, checkpoint)
    report = load_weights(tuned, checkpoint, adapt=True)
    assert report.missing == report.unexpected == report.reinitialised == []
    torch.save(state, tmp_path / "bare.pth")
    overlay = {"file": str(tmp_path / "bare.pth"), "num_classes": 3}
    models = [resumed, tuned]
    if name != "convnext_tiny":  # timm has a filter of its own for those
        models.append(build(pretrained=True, pretrained_cfg_overlay=overlay))
        models.append(build(checkpoint_path=str(tmp_path / "bare.pth")))
    for model in models:
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


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


def resume(data, out, path, name, *argv):
    return train("--model", name, *RUN, "--resume", str(path), *argv, data=data, out=out)


@pytest.mark.parametrize(
    ("layout", "name", "opt", "prefix"),
    [
        ("timm", "resmlp_12", "adamw", ""),
        ("deit", "d2_deit_tiny_patch16_LS", "fusedlamb", "_orig_mod."),
        ("convnext", "d2_convnext_isotropic_small", "adamw", "_orig_mod."),
    ],
)
def test_a_published_file_is_gone_on_with(
    layout, name, opt, prefix, data, tmp_path, capsys, monkeypatch
):
    """Weights, average, moments, scaler, epoch: only the random states are left to tell."""
    path = tmp_path / "published.pth"
    theirs, moments = save_published(path, name, layout=layout, opt=opt, prefix=prefix)
    # Nothing is trained: what is saved is what was read.
    monkeypatch.setattr("deit.main.train", lambda run: run.save(["checkpoint.pth"]))
    half = classmethod(lambda cls, device, *_: cls(device, torch.float16))
    monkeypatch.setattr(Precision, "choose", half)
    course = () if layout == "timm" else ("--sched-as-published", layout)
    options = (*AS_PUBLISHED, *course, "--opt", opt)
    assert resume(data, tmp_path / "out", path, name, *options) == 0
    told = capsys.readouterr().out
    assert not re.search("moments|--decay-as-compiled|--sched-as-published", told)
    assert "no states of random generators" in told
    assert ("note    --opt fusedlamb is timm's Lamb, " in told) == (opt == "fusedlamb")
    ours = load(tmp_path / "out" / "checkpoint.pth")
    assert ours["epoch"] == 0
    assert ours["lr_scheduler"]["updates"] == 6
    assert ours["scaler"] == theirs["scaler"]
    for key in ("model", "model_ema"):
        assert {prefix + k for k in ours[key]} == set(theirs[key])
        assert all(torch.equal(v, theirs[key][prefix + k]) for k, v in ours[key].items())
    state, groups = ours["optimizer"]["state"], ours["optimizer"]["param_groups"]
    assert {int(group.get("step", 3)) for group in groups} == {3}
    assert len(state) == len(moments)
    where = {prefix + name: n for n, name in enumerate(ours["parameters"])}
    for name, saved in moments.items():
        for key, value in saved.items():
            assert torch.equal(state[where[name]][key].reshape(value.shape), value), (name, key)


def test_what_a_published_run_did_otherwise_is_told(data, tmp_path, capsys):
    name, path = "d2_deit_tiny_patch16_LS", tmp_path / "published.pth"
    save_published(path, name, layout="deit", opt="fusedlamb", prefix="_orig_mod.")
    options = ("--opt", "lamb", "--weight-decay", "0.1", "--no-model-ema", "--lr", "5e-4")
    assert resume(data, tmp_path / "out", path, name, *options) == 0
    told = capsys.readouterr().out
    for words in (
        "weight decay on cls_token.0, pos_embed.0, pos_embed.1: --decay-as-compiled",
        "--sched-as-published deit",
        "average (model_ema) is dropped",
        "--lr is 0.0005, it was 0.001",
    ):
        assert words in told
    assert not re.search("--opt is|--gpu", told), "lamb and fusedlamb are one optimizer"
    assert load(tmp_path / "out" / "checkpoint.pth")["epoch"] == 2


def test_weights_alone_where_the_moments_cannot_be_placed(data, tmp_path, capsys):
    name, path = "d2_convnext_isotropic_small", tmp_path / "published.pth"
    checkpoint, _ = save_published(path, name, layout="convnext", opt="adamw", epoch="best")
    assert resume(data, "", path, name) == 2
    told = capsys.readouterr().err
    assert "epoch is 'best'): give the one to go on with by --start-epoch" in told
    groups = checkpoint["optimizer"]["param_groups"]
    groups[0]["params"].append(groups[1]["params"].pop())
    torch.save(checkpoint | {"epoch": 1}, path)
    assert resume(data, "", path, name) == 2
    told = capsys.readouterr().err
    assert re.search("cannot be told apart.*--resume-weights-only", told)
    out = tmp_path / "out"
    assert resume(data, out, path, name, "--resume-weights-only") == 0
    assert "the optimizer's moments start at zero" in capsys.readouterr().out
    ours = load(out / "checkpoint.pth")
    assert ours["epoch"] == 2
    assert {int(state["step"]) for state in ours["optimizer"]["state"].values()} == {6}
