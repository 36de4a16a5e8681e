"""Which parameters decay, how fast layers learn, which implementation is built."""

import copy
import re
import sys
from argparse import Namespace

import apex_double
import pytest
import timm
import timm.optim
import torch
from timm.optim import Lamb
from torch import nn
from training_runs import TINY_NETWORKS, optimizer_for

import deit.models  # noqa: F401 - registers the networks
from deit.errors import UserError
from deit.train import optim
from deit.train.args import parse_args
from deit.train.distributed import DistContext
from deit.train.engine import Precision, Progress, TrainingState
from deit.train.losses import TrainingLoss
from deit.train.moments import load_optimizer, optimizer_state
from deit.train.optim import (
    build_optimizer,
    decays,
    decays_as_compiled,
    freeze_shift,
    parameter_groups,
    peak_lr,
)


def tiny_vit(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, **kwargs)


@pytest.mark.parametrize(
    ("name", "shape", "decayed", "as_compiled"),
    [
        ("linear_sym.weight", (6, 6), True, True),
        ("odd.weight", (1, 6), True, True),
        ("conv.weight", (1, 4, 6), True, True),
        ("norm.weight", (6,), False, False),
        ("alpha", (1, 1, 6), False, True),
        ("gamma", (6,), False, True),
        ("attn_mixer", (2,), False, False),
        ("linear.bias", (2, 3), False, False),
        ("pos_embed.0", (1, 4, 6), False, True),
        ("cls_token.0", (1, 1, 6), False, True),
        ("dist_token", (1, 1, 6), False, True),
    ],
)
def test_only_maps_decay(name, shape, decayed, as_compiled):
    """Published runs that were compiled went by shape and name alone."""
    assert decays(name, torch.ones(shape)) == decayed
    assert decays_as_compiled(name, torch.ones(shape)) == as_compiled


def test_wildcards_and_modules_can_be_exempt():
    weight = torch.ones(2, 3)
    assert not decays("blocks.0.attn.weight", weight, {"blocks.*.attn.weight"})
    assert not decays("blocks.0.attn.weight", weight, {"blocks.0.attn"})
    assert decays("blocks.0.attn_out.weight", weight, {"blocks.0.attn"})


def names_with_decay(model):
    groups = parameter_groups(model, weight_decay=0.1)
    assert {g["weight_decay"] for g in groups} <= {0.0, 0.1}
    assert all(g["wd_scale"] == (g["weight_decay"] > 0) for g in groups)
    every = [id(p) for g in groups for p in g["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    return decaying(model, groups)


def decaying(model, groups):
    decayed = {id(p) for g in groups for p in g["params"] if g["weight_decay"]}
    return {name for name, p in model.named_parameters() if id(p) in decayed}


def test_weight_decay_and_layer_decay_are_timms():
    model = tiny_vit(class_token=True, init_values=1e-5)
    model.patch_embed.requires_grad_(False)
    exempt = model.no_weight_decay()
    theirs = timm.optim.param_groups_weight_decay(model, 0.1, no_weight_decay_list=exempt)
    assert names_with_decay(model) == decaying(model, theirs)
    model.no_weight_decay = lambda: {"head"}
    assert decaying(model, theirs) - names_with_decay(model) == {"head.weight"}

    theirs = timm.optim.param_groups_layer_decay(model, 0.1, exempt, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in theirs for p in g["params"]}
    ours = parameter_groups(model, 0.1, layer_decay=0.5)
    assert all(g["lr_scale"] == scale[id(p)] for g in ours for p in g["params"])
    assert sorted({g["lr_scale"] for g in ours}) == [0.125, 0.25, 0.5, 1.0]
    with pytest.raises(UserError, match=r"Linear does not say .*group_matcher"):
        parameter_groups(nn.Linear(3, 4), 0.1, layer_decay=0.5)


def test_learning_rate_is_for_512_images():
    assert peak_lr(parse_args(["--lr", "5e-4"]), 4096) == pytest.approx(4e-3)
    assert peak_lr(parse_args(["--lr", "5e-4", "--unscale-lr"]), 4096) == 5e-4


def state_of(model, optimizer, world_size=1, **options):
    args = Namespace(**({"update_freq": 1, "clip_grad": None, "compile": False} | options))
    processes = DistContext(torch.device("cpu"), world_size=world_size)
    criterion, precision = TrainingLoss(nn.CrossEntropyLoss()), Precision(processes.device, None)
    more = (criterion, optimizer, None, precision, Progress())
    return TrainingState(args, processes, model, model, *more)


def two_updates(model, optimizer, size=32, **options):
    """Two updates of the training loop, with random images."""
    torch.manual_seed(0)
    images = [torch.randn(2, 3, size, size) for _ in range(2)]
    batches = iter([(x, torch.tensor([0, 1])) for x in images])
    state = state_of(model, optimizer, **options)
    for number in range(2):
        state.update(batches, number)


def small_for(opt):
    """Parameters of every number of axes, for images of 4 pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 2, 2), nn.GELU(), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)
    )
    optimizer = optimizer_for(model, opt=opt, lr=1e-3, weight_decay=0.1, opt_eps=1e-8)
    return model, optimizer


def assert_goes_on(model, optimizer, again, resumed, saved, **tolerance):
    """After the state `saved` of one optimizer is loaded into another, both make the same steps."""
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    load_optimizer(again, resumed, copy.deepcopy(saved), "a.pth")
    for network, stepper in ((model, optimizer), (again, resumed)):
        two_updates(network, stepper, size=4)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


EXACT, CLOSE = {"rtol": 0, "atol": 0}, {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def _no_compiler():
    """kron compiles its own steps, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("_no_compiler")
@pytest.mark.parametrize(
    "opt",
    [name for inner in timm.optim.list_optimizers() for name in (inner, f"lookahead_{inner}")],
)
def test_every_name_trains_or_is_refused_in_one_line(opt):
    """Two updates; and what is saved then goes on with the same bits."""
    inner = opt.removeprefix("lookahead_")
    if inner.startswith(("bnb", "fused")) and opt != "fusedlamb" and not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"^[^\n]*CUDA[^\n]*$"):
            small_for(opt)
        return
    model, optimizer = small_for(opt)
    start = [p.detach().clone() for p in model.parameters()]
    two_updates(model, optimizer, size=4)
    moved = [bool((a != b).any()) for a, b in zip(start, model.parameters(), strict=True)]
    assert all(moved)
    assert all(p.isfinite().all() for p in model.parameters())
    assert_goes_on(model, optimizer, *small_for(opt), optimizer_state(optimizer), **EXACT)


@pytest.mark.parametrize(
    ("compiled", "processes", "words"),
    [(True, 1, "--compile cannot give: omit it"), (False, 2, "several processes cannot give")],
)
def test_second_derivatives_are_refused_where_there_are_none(compiled, processes, words):
    model = nn.Linear(3, 4)
    optimizer = optimizer_for(model, opt="adahessian", lr=0.1)
    with pytest.raises(UserError, match=words):
        state_of(model, optimizer, processes, opt="adahessian", compile=compiled)


@pytest.mark.parametrize("opt", ["adam", "adamw", "lookahead_adamw"])
def test_fused_on_a_gpu_and_resumed_without_one(opt, monkeypatch):
    monkeypatch.setattr(optim, "_on_gpu", lambda groups: True)
    model, optimizer = small_for(opt)
    assert all(group["fused"] for group in optimizer.param_groups)
    two_updates(model, optimizer, size=4)
    monkeypatch.undo()
    plain, resumed = small_for(opt)
    assert_goes_on(model, optimizer, plain, resumed, optimizer_state(optimizer), **CLOSE)
    assert not any(group.get("fused") for group in resumed.param_groups)


def test_settings_reach_the_optimizer():
    model = nn.Linear(3, 4)
    adamw = optimizer_for(
        model, opt="adamw", lr=0.1, weight_decay=0.2, opt_eps=1e-5, opt_betas=[0.8, 0.9]
    )
    assert {g["weight_decay"] for g in adamw.param_groups} == {0.0, 0.2}
    assert all(g["eps"] == 1e-5 for g in adamw.param_groups)
    assert all(tuple(g["betas"]) == (0.8, 0.9) for g in adamw.param_groups)
    sgd = optimizer_for(model, opt="momentum", lr=0.1, momentum=0.7, opt_eps=1e-8)
    assert all(g["momentum"] == 0.7 for g in sgd.param_groups)
    lamb = optimizer_for(model, opt="lamb", lr=0.1, opt_eps=1e-8)
    assert all(g["eps"] == 1e-8 and g["betas"] == (0.9, 0.999) for g in lamb.param_groups)


def test_fusedlamb_says_which_lamb_it_is(monkeypatch):
    class Broken:
        def __init__(self, *args, **kwargs):
            raise RuntimeError("apex.optimizers.FusedLAMB requires cuda extensions")

    def build(opt):
        optimizer, notes = build_optimizer(nn.Linear(3, 4), parse_args(["--opt", opt]), lr=0.1)
        return type(optimizer), " ".join(notes)

    ours = "--opt fusedlamb is timm's Lamb, with the updates of apex's FusedLAMB: "
    assert build("lamb") == (Lamb, "")
    for name in ("fusedlamb", "FusedLAMB"):
        assert build(name) == (Lamb, f"{ours}that needs whole weights on a GPU")
    theirs = apex_double.install(monkeypatch)
    assert build("fusedlamb") == (theirs, "--opt fusedlamb is apex's FusedLAMB")
    assert build("lamb") == (Lamb, "")
    sys.modules["apex.optimizers"].FusedLAMB = Broken
    assert build("fusedlamb") == (Lamb, f"{ours}apex.optimizers.FusedLAMB requires cuda extensions")
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    kind, note = build("fusedlamb")
    assert kind is Lamb
    assert re.match(f"{ours}.*apex.optimizers", note)


SHAPES = [(5, 7), (7,), (1, 3, 6), (4, 3, 2, 2), (1,), ()]


def updated(lamb, scale=1.0, **options):
    """Parameters of many shapes before and after 20 updates, in groups of three decays."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    with torch.no_grad():
        params[2].zero_()  # a weight of norm zero has trust ratio 1
    start = [p.detach().clone() for p in params]
    groups = [
        {"params": params[:2], "weight_decay": 0.3},
        {"params": params[2:4], "weight_decay": 0.02, "lr": 0.01},
        {"params": params[4:], "weight_decay": 0.0},
    ]
    optimizer = lamb(groups, lr=0.02, **options)
    for step in range(20):
        for i, p in enumerate(params):
            p.grad = scale * torch.randn(p.shape)
            if (i, step) == (1, 3):
                p.grad = None
        optimizer.step()
    return start, params


@pytest.mark.parametrize("foreach", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("scale", [3.0, 0.01], ids=["clipped", "unclipped"])
def test_lamb_makes_the_updates_of_apex(scale, foreach):
    start, ours = updated(Lamb, scale, foreach=foreach)
    _, theirs = updated(apex_double.FusedLAMB, scale)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(start, ours, strict=True))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lamb", [Lamb, apex_double.FusedLAMB])
def test_first_update_of_lamb_by_hand(lamb):
    weight, grad = torch.tensor([3.0, 4.0]), torch.tensor([6.0, -8.0])
    p = nn.Parameter(weight.clone())
    p.grad = grad.clone()
    lamb([p], lr=0.1, eps=0.0, weight_decay=0.5).step()
    # Bias-corrected, the first m / sqrt(v) is the sign of the gradient, whatever the clipping.
    update = grad.sign() + 0.5 * weight
    torch.testing.assert_close(p.detach(), weight - 0.1 * 5 / update.norm() * update)
    assert torch.equal(p.grad, grad), "clipping must not touch the gradient"


@pytest.mark.parametrize("name", TINY_NETWORKS)
def test_every_family_has_second_derivatives_and_the_updates_of_apex(name, monkeypatch):
    """apex takes what the training loop hands it: calls, dtypes, layouts, numbers."""
    theirs = apex_double.install(monkeypatch)
    trained = {}
    for opt in ("adahessian", "fusedlamb", "lamb"):
        torch.manual_seed(1)
        model = timm.create_model(name, num_classes=3, **TINY_NETWORKS[name])
        optimizer = optimizer_for(model, opt=opt, lr=0.01, weight_decay=0.02, opt_eps=1e-4)
        assert (type(optimizer) is theirs) == (opt == "fusedlamb")
        two_updates(model, optimizer, clip_grad=1.0 if opt == "adahessian" else None)
        assert all(p.isfinite().all() and p.grad is None for p in model.parameters())
        trained[opt] = model.state_dict()
    torch.testing.assert_close(trained["lamb"], trained["fusedlamb"], **CLOSE)


@pytest.mark.parametrize("names", [("lamb", "fusedlamb"), ("fusedlamb", "lamb")])
def test_one_lamb_goes_on_where_the_other_stopped(names, monkeypatch):
    """Each looks up in a group what the other one has saved, and counts in its own way."""
    apex_double.install(monkeypatch)
    model, first = small_for(names[0])
    two_updates(model, first, size=4)
    assert_goes_on(model, first, *small_for(names[1]), first.state_dict(), **CLOSE)


def test_published_shifts_stay_at_zero():
    model = timm.create_model("resmlp_equi_d2_12", img_size=32, depth=1, num_classes=3)
    assert freeze_shift(model) == ""
    two_updates(model, optimizer_for(model, opt="adamw", lr=0.1))
    shifts = {n: p for n, p in model.named_parameters() if n.endswith(("beta_sym", "beta_asym"))}
    assert len(shifts) == 4
    assert all((p == 0).all() and p.grad is None for p in shifts.values())
    assert (model.norm.beta != 0).all(), "published too, the ordinary shift is trained"
    assert "no effect" in freeze_shift(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"opt": "adamww"}, r"unknown optimizer 'adamww'; did you mean .*adamw"),
        ({"opt": "adan", "opt_betas": [0.9, 0.99]}, "'adan' takes 3 betas, got 2"),
        ({"opt": "sgd", "frozen": True}, "no trainable parameter"),
    ],
)
def test_what_cannot_be_built_is_one_clear_error(settings, words):
    network = nn.Linear(3, 4).requires_grad_("frozen" not in settings)
    with pytest.raises(UserError, match=words):
        optimizer_for(network, **settings)
