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
RECORD = {
    "epoch": 0,
    "train_loss": 2.0,
    "train_lr": 1e-3,
    "test_loss": 1.5,
    "test_acc1": 40.0,
    "test_acc5": 80.0,
    "n_parameters": 10,
    "time": 3.0,
}


CONFIG = {"updates_per_epoch": 4, "global_batch": 8}


def make_reporter(*argv, rank=0, folder="", progress=None) -> Reporter:
    words = ["--epochs", "3", "--log-interval", "2", "--output-dir", str(folder), *argv]
    return Reporter(parse_args(words), DistContext(CPU, rank, 2), CONFIG, progress or Progress())


def test_plain_lines_where_there_is_no_terminal(capsys):
    reporter = make_reporter(progress=(progress := Progress(epoch=1)))
    reporter.start("epoch 2/3", 4)
    for progress.step in range(1, 5):
        reporter.on_update(1e-3, 2.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    pattern = (
        r"epoch 2/3  step 2/4  loss 2.5000  lr 1.00e-03  [\d,]+ images/s  [\d.]+ GiB  \S+ left"
    )
    assert re.fullmatch(pattern, lines[0]), lines[0]
    assert "step 4/4" in lines[1]
    assert memory_used(CPU) > 2**20


def test_a_bar_on_a_terminal():
    reporter = make_reporter(progress=(progress := Progress()))
    reporter.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    reporter.start("epoch 1/3", 4)
    for progress.step, loss in ((1, 2.5), (2, None)):  # the loss is not looked at each time
        reporter.on_update(1e-3, loss)
    reporter.start("testing", 5)
    reporter.on_batch(1, 5)
    reporter.stop()
    shown = reporter.console.file.getvalue()
    assert "2/4" in shown
    assert "loss 2.5000" in shown
    assert "1/5" in shown


def test_other_ranks_are_silent(tmp_path, capsys):
    reporter = make_reporter(rank=1, folder=tmp_path, progress=Progress(step=2, history=[RECORD]))
    reporter.start("epoch 1/3", 4)
    reporter.on_update(1e-3, 2.5)
    reporter.say("hello")
    reporter.end_epoch(RECORD)
    assert reporter.close() is None
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_log_is_cut_back_to_what_a_checkpoint_knows(tmp_path):
    history = [RECORD | {"epoch": epoch} for epoch in range(3)]
    make_reporter(folder=tmp_path, progress=Progress(history=history))
    with (tmp_path / "log.txt").open("a") as file:
        file.write('{"epoch": 3, "tra')
    assert read_log(tmp_path) == history
    make_reporter(folder=tmp_path, progress=Progress(history=history[:2]))
    assert (tmp_path / "log.txt").read_text() == "".join(json.dumps(r) + "\n" for r in history[:2])


def test_curves_with_gaps(tmp_path):
    """An epoch may not have been evaluated."""
    partial = {key: value for key, value in RECORD.items() if not key.startswith("test_")}
    draw_curves([partial, RECORD | {"epoch": 1}], tmp_path / "c.png", title="a net")
    draw_curves([partial], tmp_path / "d.png")
    for name in ("c.png", "d.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("end"),
        id="id0",
        log_artifact=lambda artifact: calls.append(artifact),
    )
    artifact = types.SimpleNamespace(add_file=lambda path: calls.append(path))
    fake = types.ModuleType("wandb")
    fake.util = types.SimpleNamespace(generate_id=lambda: f"id{len(calls)}")
    fake.init = lambda **kwargs: calls.append(kwargs) or run
    fake.Artifact = lambda name, type: calls.append(name) or artifact
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "checkpoint.pth").touch()
    for project in ("", "mine"):
        options = ("--wandb", "--wandb-ckpt", f"--project={project}")
        reporter = make_reporter(*options, folder=tmp_path)
        reporter.end_epoch(RECORD)
        reporter.close()
    starts = [call for call in calls if isinstance(call, dict)]
    assert [start["id"] for start in starts] == ["id0", "id0"]
    assert starts[0]["config"] == CONFIG
    step, values = next(call for call in calls if isinstance(call, tuple))
    assert step == 4
    assert values["test/acc1"] == 40.0
    name, project = "run-id0-checkpoints", starts[1]["project"]
    assert calls[-4:] == [name, str(tmp_path / "checkpoint.pth"), artifact, "end"]
    assert (starts[0]["project"], project) == ("mirror-equivariant-vision", "mine")

    def refuse(**kwargs):
        raise RuntimeError("no key\nno login")

    fake.init = refuse
    with pytest.raises(UserError, match="did not start: no key no login"):
        make_reporter("--wandb", folder=tmp_path)
