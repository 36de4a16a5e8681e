"""A training that was interrupted anywhere ends like one that never was, bit for bit."""

import functools
import json
import os
import signal
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from training_runs import (
    at_call,
    differences,
    load,
    make_images,
    optimizer_for,
    refused,
    run,
    run_processes,
    strike,
    train,
)

import deit.main
import deit.train.stopping
from deit.errors import UserError
from deit.train.engine import TrainingState
from deit.train.folder import read_log
from deit.train.moments import load_optimizer
from deit.train.reporting import Reporter
from deit.train.run import Run

# Three epochs of three updates of two batches; workers, fp32, every random augmentation.
OPTIONS = ("--epochs", "3", "--update-freq", "2", "--drop", "0.1", "--clip-grad", "1")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The output folder of an uninterrupted training."""
    out = tmp_path_factory.mktemp("whole")
    assert train(*OPTIONS, "--save-freq", "2", data=data, out=out) == 0
    return out


def assert_same_outcome(out: Path, whole: Path):
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        assert differences(load(out / name), load(whole / name)) == []
    assert differences(read_log(out), read_log(whole)) == []
    assert [record["epoch"] for record in read_log(out)] == [0, 1, 2]
    assert not list(out.glob("*.tmp")) + list(out.glob(".*"))


def test_what_a_checkpoint_holds(whole):
    # Plain types only: anybody can read it, with torch's defaults.
    torch.serialization.clear_safe_globals()
    checkpoint = load(whole / "checkpoint.pth")
    published = {"model", "model_ema", "optimizer", "lr_scheduler", "epoch", "scaler", "args"}
    assert published <= checkpoint.keys()
    assert (checkpoint["epoch"], checkpoint["args"]["model"]) == (2, "test_vit")
    assert checkpoint["class_names"] == ["class0", "class1", "class2"]
    assert differences(checkpoint["model"], checkpoint["model_ema"]) != []
    copies = {path.name: load(path)["epoch"] for path in whole.glob("checkpoint_*")}
    assert copies == {"checkpoint_0001.pth": 1}


die = functools.partial(strike, signal.SIGKILL)


def die_after_half_a_file(state, file):
    file.write(bytes(1000))
    file.flush()
    die()


MOMENTS = {
    "first update": (TrainingState, "update", 1, die),
    "mid-epoch": (TrainingState, "update", 5, die),
    "before the log": (Reporter, "end_epoch", 2, die),
    "before the save": (Run, "save", 4, die),
    "in the write": (torch, "save", 4, die_after_half_a_file),
    # the second epoch's best file is in its place, its checkpoint.pth is not
    "between the files": (os, "replace", 10, die),
}


def killed(moment: str, data: Path, out: Path) -> int:
    """Train in a process of its own until it kills itself at `moment`."""
    at_call(*MOMENTS[moment])
    return train(*OPTIONS, data=data, out=out)


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_and_resume(moment, data, whole, tmp_path):
    out = tmp_path / "out"
    body = functools.partial(killed, moment, data, out)
    [(status, output)] = run_processes([body], (), tmp_path, distributed=False)
    assert status == -signal.SIGKILL, output
    # With other numbers of workers, which must not matter.
    assert train(*OPTIONS, "--resume", "auto", "--num-workers", "2", data=data, out=out) == 0
    assert_same_outcome(out, whole)


@pytest.fixture
def interrupt(monkeypatch):
    """Have the process send itself `signals` before the `call`-th call of a function."""

    def interrupt(owner, name: str, call: int, *signals: int) -> None:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be undone
        at_call(owner, name, call, lambda *_, **options: [strike(s) for s in signals])

    return interrupt


@pytest.mark.parametrize(
    ("number", "call", "place"),
    [
        # The third update ends an epoch: it is evaluated when the training goes on.
        (signal.SIGTERM, (TrainingState, "update", 3), (0, 3)),
        (signal.SIGTERM, (deit.main, "evaluate", 1), (0, 3)),
        (signal.SIGUSR1, (TrainingState, "update", 5), (1, 2)),
        (signal.SIGINT, (TrainingState, "update", 5), (1, 2)),
    ],
)
def test_signal_stops_between_updates(number, call, place, data, whole, tmp_path, interrupt, capfd):
    interrupt(*call, number, number)  # a launcher passes on what its terminal has sent already
    assert train(*OPTIONS, data=data, out=tmp_path) == 0
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    captured = capfd.readouterr()
    assert f"{number.name}: stopping after this update" in captured.err
    assert "--resume auto" in captured.out
    checkpoint = load(tmp_path / "checkpoint.pth")
    assert (checkpoint["epoch"] + 1, checkpoint["step"]) == place
    assert len(read_log(tmp_path)) == (tmp_path / "curves.png").exists() == place[0]
    assert train(*OPTIONS, "--resume", "auto", data=data, out=tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


LOST = {
    "pipe": os.pipe,
    "terminal": os.openpty,
    "full": lambda: (os.open(os.devnull, os.O_RDONLY), os.open("/dev/full", os.O_WRONLY)),
}


def train_unheard(kind: str, data: Path, out: Path) -> int:
    """Train, and stop on SIGTERM, with an output whose reader goes away at the second update."""
    reader, writer = LOST[kind]()
    os.environ["TERM"] = "xterm"
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)
    at_call(TrainingState, "update", 2, lambda *_: os.close(reader))
    at_call(TrainingState, "update", 5, functools.partial(strike, signal.SIGTERM))
    return train(*OPTIONS, "--log-interval", "1", data=data, out=out)


@pytest.mark.parametrize("kind", LOST)
def test_a_lost_terminal_does_not_lose_the_run(kind, data, tmp_path):
    body = functools.partial(train_unheard, kind, data, tmp_path)
    [(status, _)] = run_processes([body], (), tmp_path, distributed=False)
    checkpoint = load(tmp_path / "checkpoint.pth")
    assert (status, checkpoint["epoch"] + 1, checkpoint["step"]) == (0, 1, 2)


def test_an_unreadable_test_image_loses_no_epoch(whole, tmp_path):
    folder, out = make_images(tmp_path / "data"), tmp_path / "out"
    path = folder / "val" / "class1" / "1.png"
    image = path.read_bytes()
    path.write_bytes(image[:200])
    error = refused(*OPTIONS, data=folder, out=out)
    assert str(path) in error
    assert f"the last state is {out / 'checkpoint.pth'}, --resume auto goes on" in error
    assert load(out / "checkpoint.pth")["step"] == 3
    path.write_bytes(image)
    assert train(*OPTIONS, "--resume", "auto", data=folder, out=out) == 0
    assert_same_outcome(out, whole)


def test_second_interrupt_quits_at_once(data, tmp_path, interrupt, monkeypatch):
    monkeypatch.setattr(deit.train.stopping, "_DOUBLE_INTERRUPT", -1.0)
    interrupt(TrainingState, "update", 2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(*OPTIONS, data=data, out=tmp_path)
    assert not (tmp_path / "checkpoint.pth").exists()


def test_resume_of_a_complete_training_changes_nothing(data, whole):
    before = (whole / "checkpoint.pth").read_bytes()
    assert "all 3 epochs are done" in run(*OPTIONS, "--resume", "auto", data=data, out=whole)
    assert (whole / "checkpoint.pth").read_bytes() == before
    assert len(read_log(whole)) == 3


def test_each_option_that_changed_wins_and_is_told(data, whole, tmp_path):
    """One line for each, and none for what says where and how it is run."""
    source = whole / "checkpoint.pth"
    same = (*OPTIONS, "--resume", source, "--num-workers", "1", "--log-interval", "7")
    assert " it was " not in run(*same, data=data, out=tmp_path / "same")
    changed = ("--lr", "0.05", "--drop-path", "0.2", "--epochs", "4", "--no-model-ema")
    changed += ("--sched", "constant")
    output = run(*OPTIONS, *changed, "--resume", source, data=data, out=tmp_path / "new")
    notes = [line.removeprefix("note    ") for line in output.splitlines() if " it was " in line]
    assert sorted(notes) == [
        "--drop-path is 0.2, it was 0.1",
        "--epochs is 4, it was 3",
        "--lr is 0.05, it was 0.001",
        "--model-ema is off, it was on",
        "--sched is constant, it was cosine",
    ]
    assert "its average (model_ema) is dropped" in output
    rates = {record["epoch"]: record["train_lr"] for record in read_log(tmp_path / "new")}
    assert list(rates) == [0, 1, 2, 3]
    assert rates[3] == pytest.approx(0.05)
    error = refused("--resume", source, "--opt", "lamb", data=data)
    assert "is of --opt adamw, this run has --opt lamb" in error


def test_groups_may_change_where_names_are_known(data, tmp_path, monkeypatch):
    """Decay by another rule: every moment stays with its parameter."""
    model = ("--model", "d2_deit_tiny_patch16_LS", "--model-kwargs", "depth=1", "--epochs", "1")
    assert train(*model, data=data, out=tmp_path / "one") == 0
    # Nothing is trained: what is saved is what was read.
    monkeypatch.setattr("deit.main.train", lambda run: run.save(["checkpoint.pth"]))
    other = (*model, "--resume", tmp_path / "one" / "checkpoint.pth", "--decay-as-compiled")
    assert train(*other, data=data, out=tmp_path / "two") == 0
    before, after = (load(tmp_path / name / "checkpoint.pth") for name in ("one", "two"))
    assert after["parameters"] != before["parameters"]
    moments = [
        {c["parameters"][index]: state for index, state in c["optimizer"]["state"].items()}
        for c in (before, after)
    ]
    assert differences(*moments) == []


def test_resume_from_a_published_checkpoint(data, tmp_path):
    """It has weights, an epoch and arguments, and perhaps nothing else."""
    assert train("--epochs", "1", "--no-model-ema", data=data, out=tmp_path) == 0
    own = load(tmp_path / "checkpoint.pth")
    weights = {f"_orig_mod.{key}": value for key, value in own["model"].items()}
    args = Namespace(**own["args"])
    torch.save({"model": weights, "epoch": 0, "args": args}, tmp_path / "published.pth")
    lines = ({"epoch": 0, "train_loss": 1.0}, {"loss": 2.0}, 5)  # of the published code, of others
    (tmp_path / "log.txt").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    output = run("--resume", tmp_path / "published.pth", data=data, out=tmp_path)
    assert "no optimizer state" in output
    assert "no average" in output
    assert [record["epoch"] for record in read_log(tmp_path)] == [0, 1]


def trained(*shapes, **options):
    """A network of so many parameters, and its optimizer after an update."""
    network = torch.nn.ParameterList(torch.ones(shape) for shape in shapes)
    optimizer = optimizer_for(network, **options)
    for param in network.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return network, optimizer


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ([(2, 3), (4,)], [(2, 3)], "other parameter groups"),
        ([(2, 3), (4,)], [(3, 2), (4,)], "other shapes"),
        ([(2, 3), (4,)], [(2, 4), (4,)], "other shapes"),
        # also where the checkpoint does not say which one it was
        ("sgd", "adamw", "another optimizer"),
        ("lamb", "adamw", "another optimizer"),
        ("adamw", "lamb", "another optimizer"),
        ("adamw", "momentum", "another optimizer"),
    ],
)
def test_the_state_of_another_optimizer_or_network_is_refused(theirs, ours, words):
    def made(kind):
        named = isinstance(kind, str)
        return trained((4, 3), opt=kind) if named else trained(*kind, opt="adamw")

    saved = made(theirs)[1].state_dict()
    with pytest.raises(UserError, match=rf"{words}.* --resume-weights-only"):
        load_optimizer(*made(ours), saved, "c.pth")
    load_optimizer(*made(theirs), saved, "c.pth")
