"""The main program as users meet it: what it prints, what it leaves, what it refuses."""

import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.testing import CompileCounter
from training_runs import (
    TINY,
    TRAIN_IMAGES,
    VAL_IMAGES,
    load,
    make_images,
    refused,
    run,
    run_processes,
    train,
)

import deit.main
from deit.train import evaluation
from deit.train.args import parse_args
from deit.train.build import build_model
from deit.train.engine import TrainingState
from deit.train.folder import read_log
from deit.train.reporting import Reporter
from deit.train.resume import seed_all

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    assert train("--eval-freq", "2", "--flop-eval", data=data, out=out) == 0
    return out


# what a training leaves


def test_log_figure_and_tensorboard(trained):
    first, second = read_log(trained)
    assert {"epoch", "train_loss", "train_lr", "n_parameters", "time"} == first.keys()
    tested = {"test_loss", "test_acc1", "test_acc5", "test_flop_acc1", "test_flop_same"}
    assert tested == second.keys() - first.keys()
    assert (first["epoch"], second["epoch"]) == (0, 1)
    state = load(trained / "checkpoint.pth")["model"]
    assert first["n_parameters"] == sum(value.numel() for value in state.values())
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    assert {"train/loss", "train/lr", "test/acc1"} <= set(events.Tags()["scalars"])
    for name in ("train/loss", "train_running/loss"):
        assert [event.step for event in events.Scalars(name)] == [6, 12]


def test_both_are_evaluated_and_the_best_of_each_is_kept(data, tmp_path):
    """The columns of each are those of a training that evaluates it alone."""
    options = ("--epochs", "3", "--model-ema-decay", "0.5", "--lr", "0.02", "--crop-pct", "0.9")
    cases = {
        "raw": ("--no-model-ema-eval",),
        "average": ("--model-ema-eval",),
        "both": ("--model-ema-eval=both",),
        "none": ("--no-model-ema", "--model-ema-eval", "both"),  # nothing but the weights
    }
    logs, best = {}, {}
    for name, how in cases.items():
        out = tmp_path / name
        assert train(*options, *how, data=data, out=out) == 0
        logs[name] = read_log(out)
        best[name] = load(out / "best_checkpoint.pth")["epoch"]
        assert (out / "best_checkpoint_ema.pth").exists() == (name == "both")
    keys = ("test_loss", "test_acc1", "test_acc5")
    for raw, average, both, none in zip(*logs.values(), strict=True):
        assert [both[key] for key in keys] == [raw[key] for key in keys]
        assert [both[f"{key}_ema"] for key in keys] == [average[key] for key in keys]
        assert none | {"time": raw["time"]} == raw
        assert raw["test_loss"] != average["test_loss"]
    kept = load(tmp_path / "both" / "best_checkpoint_ema.pth")
    assert best["both"] == best["raw"]
    assert kept["epoch"] == best["average"] == kept["progress"]["best_ema_epoch"]
    last = ("--resume", tmp_path / "both" / "checkpoint.pth", "--eval")
    output = run(*last, "--model-ema-eval", "both", data=data)
    assert output.count("taken from") == 1
    shown = re.findall(r"\* Acc@1 \S+ Acc@5 \S+ loss (\S+)", output)
    expected = [logs["both"][-1][key] for key in ("test_loss", "test_loss_ema")]
    assert [float(loss) for loss in shown] == pytest.approx(expected, abs=1e-3)


def test_configuration_is_written_before_the_first_step(data, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingState, "update", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train("--update-freq", "2", "--device", "auto", data=data, out=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["args"]["model"] == "test_vit"
    environment = config["environment"]
    assert environment["torch"] == torch.__version__
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert (environment["device"], environment["processes"]) == (device, 1)
    assert {"git_commit", "command", "started"} <= environment.keys()
    assert (config["global_batch"], config["updates_per_epoch"]) == (8, 3)
    assert config["peak_learning_rate"] == 1e-3


def test_without_an_output_folder_nothing_is_written(data, tmp_path, monkeypatch):
    """ThreeAugment erases nothing, and says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deit.data.loader.erase", lambda *args: pytest.fail("erased"))
    output = run("--ThreeAugment", "--reprob", "1", "--epochs", "1", data=data)
    assert list(tmp_path.iterdir()) == []
    for words in ("nothing is saved", "finished, ", "has no erasing: --reprob 1 is ignored"):
        assert words in output


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "d2_deit_tiny_patch16_LS"])
def test_attention_alone_is_trained(model, data, tmp_path):
    """What the network holds fixed stays fixed, where it lies in what is trained, too."""
    options = ("--model", model, "--model-kwargs", "depth=2", "--attn-only")
    assert train(*options, "--epochs", "1", "--seed", "3", data=data, out=tmp_path) == 0
    trained = load(tmp_path / "checkpoint.pth")["model"]
    seed_all(3)
    network, _ = build_model(parse_args([*TINY, *options]), 3)
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, trained[k])}
    own = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert changed == {n for n in own if ".attn." in n or n.startswith(("pos_embed", "head."))}


def test_compiling(data, trained, tmp_path, monkeypatch):
    """The same keys and nearly the same weights; no new compilation for odd batches."""
    counter = CompileCounter()  # counts graphs, and runs them as they are
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend=counter))
    options = ("--compile", "--model-ema-eval")
    torch._dynamo.reset()
    assert train(*options, data=data, out=tmp_path) == 0
    once = counter.frame_count
    assert once >= 2  # training and evaluation
    plain, compiled = (load(out / "checkpoint.pth")["model"] for out in (trained, tmp_path))
    assert compiled.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, atol=1e-3, rtol=1e-3)
    counter.frame_count = 0
    torch._dynamo.reset()
    assert train(*options, "--epochs", "4", "--resume", "auto", data=data, out=tmp_path) == 0
    assert counter.frame_count == once
    assert train("--resume", "auto", "--epochs", "5", data=data, out=tmp_path) == 0


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")
def test_long_trainings_do_not_leak(data, tmp_path, monkeypatch):
    """Memory, open files and threads are the same after 10 and after 40 epochs."""
    seen = {}
    before = set(threading.enumerate())
    original = Reporter.end_epoch

    def end_epoch(self, record):
        original(self, record)
        rollup = Path("/proc/self/smaps_rollup").read_text()
        resident = int(re.search(r"^Rss: +(\d+) kB", rollup, re.M)[1]) / 1024
        threads = set(threading.enumerate()) - before
        seen[record["epoch"]] = resident, len(os.listdir("/proc/self/fd")), len(threads)

    monkeypatch.setattr(Reporter, "end_epoch", end_epoch)
    quick = ("--epochs", "40", "--num-workers", "1", "--batch-size", "26")
    assert train(*quick, data=data, out=tmp_path) == 0
    resident, files, threads = (late - early for early, late in zip(seen[9], seen[39], strict=True))
    assert resident < 10
    assert files <= 3  # a checkpoint may be being written
    assert threads == 0


# evaluation


@pytest.mark.parametrize("how", ["whole checkpoint", "folded", "bare weights"])
def test_eval_prints_the_scores_of_the_training(how, data, trained, tmp_path, monkeypatch):
    """It needs the test images alone."""
    (tmp_path / "val").symlink_to(data / "val")
    source, more = trained / "checkpoint.pth", ("--fold",) if how == "folded" else ()
    if how == "bare weights":
        torch.save(load(source)["model"], tmp_path / "bare.pth")
        source = tmp_path / "bare.pth"
    monkeypatch.setattr(evaluation, "fold", folded := Mock(side_effect=evaluation.fold))
    lines = run("--eval", "--resume", source, "--flop-eval", *more, data=tmp_path).splitlines()
    assert folded.called == (how == "folded")
    last = read_log(trained)[-1]
    if how != "bare weights":
        assert lines[0] == f"note    {source}: the trained weights (model), not their average"
    assert lines[1:] == [
        f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} "
        f"loss {last['test_loss']:.3f} mirrored Acc@1 {last['test_flop_acc1']:.3f} "
        f"same answer {last['test_flop_same']:.3f}",
        f"Accuracy of the network on the {VAL_IMAGES} test images: {last['test_acc1']:.1f}%",
    ]


def test_files_that_are_not_read_are_counted_once(trained, tmp_path):
    data, notes = make_images(tmp_path), []
    for split in ("train", "val"):
        (data / split / "class0" / "._0.png").touch()
        notes.append(f"note    not read in {data / split}: hidden files: 1\n")
    tested = run("--eval", "--resume", trained / "checkpoint.pth", data=data)
    assert [tested.count(note) for note in notes] == [0, 1]
    assert f"{VAL_IMAGES} test images" in tested
    told = run("--epochs", "1", data=data)
    assert [told.count(note) for note in notes] == [1, 1]
    assert f"{TRAIN_IMAGES} training and {VAL_IMAGES} test images" in told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_on_a_gpu(dtype, data, tmp_path):
    options = ("--device", "cuda", "--amp-dtype", dtype, "--model", "d2_deit_tiny_patch16_LS")
    assert train(*options, "--fused-attn", data=data, out=tmp_path) == 0
    more = ("--resume", "auto", "--epochs", "3", "--model-ema-force-cpu")
    assert f", {dtype}; " in run(*options, *more, data=data, out=tmp_path)
    checkpoint = load(tmp_path / "checkpoint.pth")
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert bool(checkpoint["scaler"]) == (dtype == "float16")
    assert checkpoint["processes"][0]["random"]["cuda"] is not None


# what is refused


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of files that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    torch.save({"model": {"a": torch.ones(1), "b": torch.ones(2)}}, folder / "foreign.pth")
    (folder / "file").touch()
    return folder


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data-path", "{tmp}/absent"], "absent"),
        (["--model", "d2_deit_smal_patch16_LS"], "did you mean.*d2_deit_small_patch16_LS"),
        (["--resume", "{tmp}/foreign.pth"], r"\d+ missing keys .*2 unexpected keys \(a, b\)"),
        (["--model", "deit_tiny_patch16_LS", "--input-size", "40"], "32 or 48"),
        (["--model", "convnext_tiny", "--input-size", "20"], "cannot take images.* 20"),
        (["--model", "resmlp_12", "--input-size", "40"], "resmlp_12"),
        (["--model-kwargs", "num_heads=7"], "'test_vit' cannot be built: .*num_heads"),
        (["--model-kwargs", "depth=1.5"], "'test_vit' cannot be built: .*float"),
        (["--model-kwargs", "drop_path_rate=2"], "drop_path_rate is a probability"),
        (["--layer-scale-init-value", "1"], "no option --layer-scale-init-value"),
        (["--model", "convnext_isotropic_small", "--attn-only"], "no attention layers"),
        (["--nb-classes", "2"], "--nb-classes 2.*3 classes"),
        (["--batch-size", "6", "--update-freq", "5"], "26 images, fewer than .* batch of 30"),
        (["--world-size", "2"], "torchrun"),
        (["--output-dir", "{tmp}/file"], "--output-dir"),
        (["--output-dir", "{tmp}/file/below"], "--output-dir"),
        (["--eval", "--resume", "auto", "--output-dir", "{tmp}"], "no checkpoint.pth"),
        (["--wandb"], "pip install wandb"),
        (["--device", "cuda"], "no CUDA device"),
        (["--device", "xpu"], "no Intel GPU"),
        (
            ["--model", "resmlp_equi_d2_12", "--model-kwargs", "equivariant=False"],
            "no argument 'equivariant'",
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(argv, message, data, bad, capfd, monkeypatch):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if "--wandb" in argv:
        monkeypatch.setitem(sys.modules, "wandb", None)
    error = refused(*(word.format(tmp=bad) for word in argv), data=data)
    assert re.search(message, error), error
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_a_wrong_command_line_is_told_by_one_process(variable, monkeypatch, capfd):
    """Rank 0 comes to it later than a launcher takes to end it, once another process has failed."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank in ("1", "0"):
        monkeypatch.setenv(variable, rank)
        with pytest.raises(SystemExit) as stopped:
            sys.exit(deit.main.command(["--bogus"]))
        assert stopped.value.code == 2
        assert capfd.readouterr().err.count("--bogus") == (rank == "0")
    assert waited == [deit.main.PATIENCE]


@pytest.fixture
def again(trained, tmp_path):
    """A copy of the trained folder."""
    return shutil.copytree(trained, tmp_path / "again")


def test_broken_loss_says_where_and_what_to_try(data, again):
    before = (again / "checkpoint.pth").read_bytes()
    error = refused("--lr", "1e30", "--resume", "auto", "--epochs", "3", data=data, out=again)
    place = re.search(r"infinite or NaN in epoch 3 at step (\d) \(update (\d+)\)", error)
    assert int(place[2]) == 2 * 6 + int(place[1])
    assert f"the last state is {again / 'checkpoint.pth'}" in error
    assert "--clip-grad" in error
    assert (again / "checkpoint.pth").read_bytes() == before


def train_with_little_room(data: Path, out: Path) -> int:
    """The kernel's limit on the size of a file acts as a full disk does, down in the C++ writer."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return train("--resume", "auto", "--epochs", "3", data=data, out=out)


def test_full_disk_while_saving(data, again, tmp_path):
    """It is called so, not by the names that torch's zip writer has for what follows from it."""
    path = again / "checkpoint.pth"
    before = path.read_bytes()
    body = functools.partial(train_with_little_room, data, again)
    [(status, output)] = run_processes([body], (), tmp_path, distributed=False)
    assert status == 2
    reason = "the file would be larger than the system allows in .*; the previous file is unchanged"
    last = f"the last state is {path}, --resume auto goes on from it"
    assert re.search(rf"^error: cannot save '{path}': {reason}; {last}$", output, re.M), output
    assert "Traceback" not in output
    assert not [path for path in again.iterdir() if path.name.startswith(".")]
    assert path.read_bytes() == before


def test_script_runs_without_an_installation(tmp_path):
    command = [sys.executable, "deit/main.py", "--eval", "--resume", str(tmp_path / "no.pth")]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: no checkpoint at '.*no.pth': the file .*\n", done.stderr)
    assert done.stdout == ""
