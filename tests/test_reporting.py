"""What a run tells: the terminal, log.txt, curves, Weights & Biases."""

import io
import json
import re
import sys
import types

import pytest
import torch
from rich.console import Console

from deit.errors import UserError
from deit.train.args import parse_args
from deit.train.distributed import DistContext
from deit.train.engine import Progress
from deit.train.folder import read_log
from deit.train.reporting import Reporter, draw_curves, memory_used

CPU = torch.device("cpu")
RECORD = {"epoch": 0, "train_loss": 2.0, "train_lr": 1e-3, "n_parameters": 10, "time": 3.0}
RECORD |= {"test_loss": 1.5, "test_acc1": 40.0, "test_acc5": 80.0}
CONFIG = {"updates_per_epoch": 4, "global_batch": 8}


def make_reporter(*argv, rank=0, folder="", **progress) -> Reporter:
    words = ["--epochs", "3", "--log-interval", "2", "--output-dir", str(folder), *argv]
    return Reporter(parse_args(words), DistContext(CPU, rank, 2), CONFIG, Progress(**progress))


def show_an_epoch(reporter: Reporter) -> None:
    reporter.start("epoch 2/3", 4)
    for step, loss in ((1, None), (2, 2.5), (3, None), (4, None)):  # not looked at each time
        reporter._progress.step = step
        reporter.on_update(1e-3, loss)
    reporter.start("testing", 4)
    reporter.on_batch(1, 5)
    reporter.stop()


def test_plain_lines_where_there_is_no_terminal(capsys):
    show_an_epoch(make_reporter(epoch=1))
    first, second = capsys.readouterr().out.splitlines()
    numbers = r"loss 2.5000  lr 1.00e-03  [\d,]+ images/s  [\d.]+ GiB  \S+ left"
    assert re.fullmatch(f"epoch 2/3  step 2/4  {numbers}", first), first
    assert re.fullmatch(f"epoch 2/3  step 4/4  {numbers}", second), second
    assert memory_used(CPU) > 2**20


def test_a_bar_on_a_terminal():
    reporter = make_reporter(epoch=1)
    reporter.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    show_an_epoch(reporter)
    shown = reporter.console.file.getvalue()
    assert all(text in shown for text in ("epoch 2/3", "4/4", "loss 2.5000", "testing", "1/5"))


def test_other_ranks_are_silent(tmp_path, capsys):
    reporter = make_reporter(rank=1, folder=tmp_path, history=[RECORD])
    show_an_epoch(reporter)
    reporter.say("hello")
    reporter.end_epoch(RECORD)
    assert reporter.close() is None
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_log_is_cut_back_to_what_a_checkpoint_knows(tmp_path):
    history = [RECORD | {"epoch": epoch} for epoch in range(3)]
    make_reporter(folder=tmp_path, history=history)
    with (tmp_path / "log.txt").open("a") as file:
        file.write('{"epoch": 3, "tra')
    assert read_log(tmp_path) == history
    make_reporter(folder=tmp_path, history=history[:2])
    assert (tmp_path / "log.txt").read_text() == "".join(json.dumps(r) + "\n" for r in history[:2])


def test_curves_with_gaps(tmp_path):
    """An epoch may not have been evaluated."""
    partial = {key: value for key, value in RECORD.items() if not key.startswith("test_")}
    for history in ([partial, RECORD | {"epoch": 1}], [partial]):
        draw_curves(history, tmp_path / "c.png", title="a net")
        assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


class Wandb(types.ModuleType):
    """What is used of the package; `calls` has what it was asked for."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []
        self.util = types.SimpleNamespace(generate_id=lambda: f"id{len(self.calls)}")

    def init(self, **options):
        self.calls.append(options)
        return types.SimpleNamespace(
            id=options["id"],
            log=lambda values, step: self.calls.append((step, values)),
            log_artifact=lambda artifact: self.calls.append(artifact),
            finish=lambda: self.calls.append("end"),
        )

    def Artifact(self, name, type):
        files = [name]
        return types.SimpleNamespace(files=files, add_file=files.append)


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := Wandb())
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    (tmp_path / "checkpoint.pth").touch()
    for options in (("--wandb-ckpt",), ("--project", "mine")):
        reporter = make_reporter("--wandb", *options, folder=tmp_path)
        reporter.end_epoch(RECORD)
        reporter.close()
    first, log, artifact, end, second, *others = fake.calls
    assert (first["id"], first["config"], second["id"]) == ("id0", CONFIG, "id0")
    assert (first["project"], second["project"]) == ("mirror-equivariant-vision", "mine")
    assert log[0] == 4
    assert log[1].items() >= {"test/acc1": 40.0, "train/lr": 1e-3, "time": 3.0}.items()
    assert artifact.files == ["run-id0-checkpoints", str(tmp_path / "checkpoint.pth")]
    assert (end, others) == ("end", [log, "end"])


def test_wandb_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise RuntimeError("no key\nno login")

    monkeypatch.setitem(sys.modules, "wandb", fake := Wandb())
    fake.init = refuse
    with pytest.raises(UserError, match="did not start: no key no login"):
        make_reporter("--wandb", folder=tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        make_reporter("--wandb", folder=tmp_path)
