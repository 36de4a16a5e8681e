"""Which parameters decay, how fast layers learn, which implementation is built."""

import copy
import sys
from argparse import Namespace

import apex_double
import pytest
import timm
import timm.optim
import torch
from timm.optim import Lamb, param_groups_layer_decay
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
from deit.train.optim import build_optimizer, decays, freeze_shift, parameter_groups, peak_lr


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
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.1, **kwargs)
    assert {g["weight_decay"] for g in groups} <= {0.0, 0.1}
    assert all(g["wd_scale"] == (g["weight_decay"] > 0) for g in groups)
    every = [id(p) for g in groups for p in g["params"]]
    assert len(every) == len(set(every))
    assert set(every) == {id(p) for p in model.parameters() if p.requires_grad}
    return {names[id(p)] for g in groups for p in g["params"] if g["weight_decay"]}


def test_only_maps_decay():
    assert names_with_decay(Pair()) == {"linear_sym.weight", "odd.weight"}
    model = tiny_vit(class_token=True, init_values=1e-5)
    theirs = timm.optim.param_groups_weight_decay(
        model, 0.1, no_weight_decay_list=model.no_weight_decay()
    )
    decayed = {id(p) for g in theirs for p in g["params"] if g["weight_decay"]}
    ours = names_with_decay(model)
    assert ours == {name for name, p in model.named_parameters() if id(p) in decayed}
    assert "head.weight" in ours


def test_layer_decay_is_timms():
    model = tiny_vit()
    theirs = param_groups_layer_decay(model, 0.1, model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in theirs for p in g["params"]}
    ours = parameter_groups(model, 0.1, layer_decay=0.5)
    assert all(g["lr_scale"] == scale[id(p)] for g in ours for p in g["params"])
    assert sorted({g["lr_scale"] for g in ours}) == [0.125, 0.25, 0.5, 1.0]
    with pytest.raises(UserError, match="group_matcher"):
        parameter_groups(Pair(), 0.1, layer_decay=0.5)


@pytest.mark.parametrize(
    ("name", "exempt", "decayed"),
    [
        ("blocks.0.attn.weight", (), True),
        ("blocks.0.attn.weight", {"blocks.*.attn.weight"}, False),
        ("blocks.0.attn.weight", {"blocks.0.attn"}, False),
        ("blocks.0.attn_out.weight", {"blocks.0.attn"}, True),
    ],
)
def test_wildcards_and_modules_can_be_exempt(name, exempt, decayed):
    assert decays(name, torch.ones(2, 3), exempt) == decayed


def test_learning_rate_is_for_512_images():
    assert peak_lr(parse_args(["--lr", "5e-4"]), 4096) == pytest.approx(4e-3)
    assert peak_lr(parse_args(["--lr", "5e-4", "--unscale-lr"]), 4096) == 5e-4


def state_of(model, optimizer, world_size=1, **options):
    args = Namespace(**({"update_freq": 1, "clip_grad": None, "compile": False} | options))
    processes = DistContext(torch.device("cpu"), world_size=world_size)
    criterion, precision = TrainingLoss(nn.CrossEntropyLoss()), Precision(processes.device, None)
    parts = (processes, model, model, criterion, optimizer, None, precision, Progress())
    return TrainingState(args, *parts)


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


@pytest.mark.parametrize("name", TINY_NETWORKS)
def test_second_derivatives_of_every_family(name):
    model = timm.create_model(name, num_classes=3, **TINY_NETWORKS[name])
    optimizer = optimizer_for(model, opt="adahessian", lr=1e-3)
    two_updates(model, optimizer, clip_grad=1.0)
    assert all(p.isfinite().all() for p in model.parameters())


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
        args = parse_args(["--opt", opt])
        optimizer, notes = build_optimizer(nn.Linear(3, 4), args, lr=0.1)
        return type(optimizer), " ".join(notes)

    assert build("lamb") == (Lamb, "")
    for name in ("fusedlamb", "FusedLAMB"):
        kind, note = build(name)
        assert kind is Lamb
        assert note.startswith("--opt fusedlamb is timm's Lamb")
        assert note.endswith(": that needs whole weights on a GPU")
    theirs = apex_double.install(monkeypatch)
    assert build("fusedlamb") == (theirs, "--opt fusedlamb is apex's FusedLAMB")
    assert build("lamb") == (Lamb, "")
    sys.modules["apex.optimizers"].FusedLAMB = Broken
    kind, note = build("fusedlamb")
    assert kind is Lamb
    assert note.endswith(": apex.optimizers.FusedLAMB requires cuda extensions")
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    kind, note = build("fusedlamb")
    assert kind is Lamb
    assert "apex.optimizers" in note


@pytest.mark.parametrize("name", TINY_NETWORKS)
def test_apex_can_update_every_family_as_ours_does(name, monkeypatch):
    """It takes what the training loop hands it: calls, dtypes, layouts, numbers."""
    theirs = apex_double.install(monkeypatch)
    trained = {}
    for opt in ("fusedlamb", "lamb"):
        torch.manual_seed(1)
        model = timm.create_model(name, num_classes=3, **TINY_NETWORKS[name])
        optimizer = optimizer_for(model, opt=opt, lr=0.01, weight_decay=0.02, opt_eps=1e-4)
        two_updates(model, optimizer)
        trained[opt] = model.state_dict()
        assert (type(optimizer) is theirs) == (opt == "fusedlamb")
        assert all(p.grad is None for p in model.parameters())
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(trained["lamb"].values(), trained["fusedlamb"].values(), strict=True)
    )


@pytest.mark.parametrize("names", [("lamb", "fusedlamb"), ("fusedlamb", "lamb")])
def test_one_lamb_goes_on_where_the_other_stopped(names, monkeypatch):
    """Each looks up in a group what the other one has saved, and counts in its own way."""
    apex_double.install(monkeypatch)
    model, first = small_for(names[0])
    two_updates(model, first, size=4)
    assert_goes_on(model, first, *small_for(names[1]), first.state_dict(), **CLOSE)


def test_decay_as_in_compiled_published_runs():
    """Published: vectors and biases by shape and name; `_orig_mod.` hid the rest of the list."""
    model = timm.create_model("d2_deit_tiny_patch16_LS", img_size=32, depth=1)
    exceptions = {"pos_embed", "cls_token"}
    wanted = set()
    for name, p in torch.compile(model).named_parameters():
        if p.ndim > 1 and not name.endswith(".bias") and name not in exceptions:
            wanted.add(name.removeprefix("_orig_mod."))
    assert {"pos_embed.0", "pos_embed.1", "cls_token.0"} <= wanted
    assert names_with_decay(model, as_compiled=True) == wanted
    assert wanted - names_with_decay(model) == {"pos_embed.0", "pos_embed.1", "cls_token.0"}


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
        ({"opt": "fusedadam"}, r"'fusedadam' cannot be built: .*(CUDA|apex)"),
        ({"opt": "adan", "opt_betas": [0.9, 0.99]}, "'adan' takes 3 betas, got 2"),
    ],
)
def test_what_cannot_be_built_is_one_clear_error(settings, words):
    with pytest.raises(UserError, match=words):
        optimizer_for(nn.Linear(3, 4), lr=0.1, **settings)
    with pytest.raises(UserError, match="no trainable parameter"):
        optimizer_for(nn.Linear(3, 4).requires_grad_(False), lr=0.1)
