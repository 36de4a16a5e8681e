"""A training that was interrupted anywhere ends like one that never was, bit for bit."""

import functools
import json
import os
import signal
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from training_runs import differences, load, optimizer_for, run_processes, train

import deit.main
import deit.train.stopping
from deit.errors import UserError
from deit.train.checkpoint import read_checkpoint
from deit.train.engine import TrainingState
from deit.train.moments import load_optimizer
from deit.train.reporting import Reporter
from deit.train.run import Run
from deit.train.stopping import request_stop

# Three epochs of three updates of two batches; workers, fp32, every random augmentation.
OPTIONS = ("--epochs", "3", "--update-freq", "2", "--drop", "0.1", "--clip-grad", "1")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The output folder of an uninterrupted training."""
    out = tmp_path_factory.mktemp("whole")
    assert train(*OPTIONS, "--save-freq", "2", data=data, out=out) == 0
    return out


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def assert_same_outcome(out: Path, whole: Path):
    ours, theirs = load(out / "checkpoint.pth"), load(whole / "checkpoint.pth")
    assert differences(ours, theirs) == []
    best = load(out / "best_checkpoint.pth"), load(whole / "best_checkpoint.pth")
    assert differences(*best) == []
    assert differences(read_log(out), read_log(whole)) == []
    assert [record["epoch"] for record in read_log(out)] == [0, 1, 2]
    assert not list(out.glob("*.tmp")) + list(out.glob(".*"))


def test_what_a_checkpoint_holds(whole):
    checkpoint = load(whole / "checkpoint.pth")
    published = {"model", "model_ema", "optimizer", "lr_scheduler", "epoch", "scaler", "args"}
    assert published <= checkpoint.keys()
    assert checkpoint["epoch"] == 2
    assert checkpoint["args"]["model"] == "test_vit"
    assert checkpoint["class_names"] == ["class0", "class1", "class2"]
    assert differences(checkpoint["model"], checkpoint["model_ema"]) != []
    assert load(whole / "checkpoint_0001.pth")["epoch"] == 1
    assert not (whole / "checkpoint_0000.pth").exists()
    # Plain types only: anybody can read it, with torch's defaults.
    torch.serialization.clear_safe_globals()
    assert torch.load(whole / "checkpoint.pth", weights_only=True)["epoch"] == 2
    assert read_checkpoint(whole / "checkpoint.pth").options["model"] == "test_vit"


def at_call(owner, name: str, number: int, action):
    """Have the `number`-th call of a function do `action(original, *args)` in its place."""
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            return action(original, *args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_half_a_file(save, state, file):
    save(state, file)
    file.truncate(1000)
    file.flush()
    die()


MOMENTS = {
    "first update": (TrainingState, "update", 1, die),
    "mid-epoch": (TrainingState, "update", 5, die),
    "before the log": (Reporter, "end_epoch", 2, die),
    "before the save": (Run, "save", 4, die),
    "in the write": (torch, "save", 4, die_after_half_a_file),
    "before the rename": (os, "replace", 10, die),
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
    """Have the process send itself `signals` in one of its updates."""

    def interrupt(update: int, *signals: int) -> None:
        def interrupted(original, *args, **kwargs):
            for number in signals:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        monkeypatch.setattr(TrainingState, "update", TrainingState.update)  # to be undone
        at_call(TrainingState, "update", update, interrupted)

    return interrupt


@pytest.mark.parametrize(
    ("number", "update"), [(signal.SIGTERM, 3), (signal.SIGUSR1, 5), (signal.SIGINT, 5)]
)
def test_signal_stops_between_updates(number, update, data, whole, tmp_path, interrupt, capfd):
    interrupt(update, number)
    before = signal.getsignal(number)
    assert train(*OPTIONS, data=data, out=tmp_path) == 0
    assert signal.getsignal(number) == before
    captured = capfd.readouterr()
    assert f"{number.name}: stopping after this update" in captured.err
    assert "--resume auto" in captured.out
    checkpoint = load(tmp_path / "checkpoint.pth")
    # The third update ends an epoch: it is evaluated when the training goes on.
    place = (checkpoint["epoch"] + 1, checkpoint["step"])
    assert place == ((0, 3) if update == 3 else (1, 2))
    assert (tmp_path / "curves.png").exists() == (update > 3)
    assert train(*OPTIONS, "--resume", "auto", data=data, out=tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


def test_stop_in_the_evaluation(data, whole, tmp_path, monkeypatch):
    evaluated = deit.main.evaluate

    def evaluate(*args, **kwargs):
        request_stop("a test")
        return evaluated(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(deit.main, "evaluate", evaluate)
        assert train(*OPTIONS, data=data, out=tmp_path) == 0
    assert read_log(tmp_path) == []
    assert load(tmp_path / "checkpoint.pth")["step"] == 3
    source = str(tmp_path / "checkpoint.pth")
    assert train(*OPTIONS, "--resume", source, data=data, out=tmp_path) == 0
    assert_same_outcome(tmp_path, whole)


def test_second_interrupt_quits_at_once(data, tmp_path, interrupt, monkeypatch):
    monkeypatch.setattr(deit.train.stopping, "_DOUBLE_INTERRUPT", -1.0)
    interrupt(2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(*OPTIONS, data=data, out=tmp_path)
    assert not (tmp_path / "checkpoint.pth").exists()


def test_resume_of_a_complete_training_changes_nothing(data, whole, capsys):
    before = (whole / "checkpoint.pth").read_bytes()
    assert train(*OPTIONS, "--resume", "auto", data=data, out=whole) == 0
    assert "all 3 epochs are done" in capsys.readouterr().out
    assert (whole / "checkpoint.pth").read_bytes() == before
    assert len(read_log(whole)) == 3


def test_more_epochs_and_another_rate_win_over_the_checkpoint(data, tmp_path):
    short = ("--epochs", "1", "--lr", "1e-3")
    assert train(*short, data=data, out=tmp_path) == 0
    longer = ("--epochs", "2", "--lr", "5e-4", "--sched", "constant", "--resume", "auto")
    assert train(*longer, data=data, out=tmp_path) == 0
    assert [record["epoch"] for record in read_log(tmp_path)] == [0, 1]
    assert read_log(tmp_path)[1]["train_lr"] == pytest.approx(5e-4)


def test_each_option_that_changed_is_told(data, whole, tmp_path, capsys):
    """One line for each, and none for what says where and how it is run."""
    source = str(whole / "checkpoint.pth")
    same = (*OPTIONS, "--resume", source, "--num-workers", "1", "--log-interval", "7")
    assert train(*same, data=data, out=tmp_path / "same") == 0
    assert " it was " not in capsys.readouterr().out
    changed = ("--lr", "0.05", "--drop-path", "0.2", "--epochs", "4", "--no-model-ema")
    assert train(*OPTIONS, *changed, "--resume", source, data=data, out=tmp_path / "new") == 0
    output = capsys.readouterr().out
    notes = [line.removeprefix("note    ") for line in output.splitlines() if " it was " in line]
    assert sorted(notes) == [
        "--drop-path is 0.2, it was 0.1",
        "--epochs is 4, it was 3",
        "--lr is 0.05, it was 0.001",
        "--model-ema is off, it was on",
    ]
    assert "its average (model_ema) is dropped" in output


def test_groups_may_change_where_names_are_known(data, tmp_path):
    """Decay by another rule: every moment stays with its parameter."""
    model = ("--model", "d2_deit_tiny_patch16_LS", "--model-kwargs", "depth=1", "--epochs", "1")
    assert train(*model, data=data, out=tmp_path / "one") == 0
    before = load(tmp_path / "one" / "checkpoint.pth")
    source = ("--resume", str(tmp_path / "one" / "checkpoint.pth"), "--save-freq", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deit.main.train", lambda run: run.save(["checkpoint.pth"]))
        other = (*model, *source, "--decay-as-compiled")
        assert train(*other, data=data, out=tmp_path / "two") == 0
    after = load(tmp_path / "two" / "checkpoint.pth")
    assert after["parameters"] != before["parameters"]
    moments = [
        {c["parameters"][index]: state for index, state in c["optimizer"]["state"].items()}
        for c in (before, after)
    ]
    assert differences(*moments) == []


def test_resume_from_a_published_checkpoint(data, tmp_path, capsys):
    """It has weights, an epoch and arguments, and perhaps nothing else."""
    assert train("--epochs", "1", "--no-model-ema", data=data, out=tmp_path) == 0
    own = load(tmp_path / "checkpoint.pth")
    weights = {f"_orig_mod.{key}": value for key, value in own["model"].items()}
    args = Namespace(**own["args"])
    torch.save({"model": weights, "epoch": 0, "args": args}, tmp_path / "published.pth")
    source = str(tmp_path / "published.pth")
    assert train("--resume", source, data=data, out=tmp_path) == 0
    output = capsys.readouterr().out
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
    ("shapes", "words"),
    [
        ([(2, 3)], "other parameter groups"),
        ([(3, 2), (4,)], "other shapes"),
        ([(2, 4), (4,)], "other shapes"),
    ],
)
def test_the_optimizer_of_another_network_is_refused(shapes, words):
    _, saved = trained((2, 3), (4,), opt="adamw")
    with pytest.raises(UserError, match=words):
        load_optimizer(*trained(*shapes, opt="adamw"), saved.state_dict(), "c.pth")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("sgd", "adamw"), ("lamb", "adamw"), ("adamw", "lamb"), ("adamw", "momentum")],
)
def test_the_state_of_another_optimizer_is_refused(theirs, ours):
    """Also where the checkpoint does not say which one it was."""
    _, saved = trained((4, 3), opt=theirs)
    with pytest.raises(UserError, match=r"of another optimizer .* --resume-weights-only"):
        load_optimizer(*trained((4, 3), opt=ours), saved.state_dict(), "c.pth")
    load_optimizer(*trained((4, 3), opt=theirs), saved.state_dict(), "c.pth")


def test_another_optimizer_is_refused(data, whole, tmp_path, capsys):
    source = str(whole / "checkpoint.pth")
    assert train("--resume", source, "--opt", "lamb", data=data, out=tmp_path) == 2
    assert "is of --opt adamw, this run has --opt lamb" in capsys.readouterr().err
