"""The main program as users meet it: what it prints, what it leaves, what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.testing import CompileCounter
from training_runs import TINY, TRAIN_IMAGES, VAL_IMAGES, load, make_images, train

import deit.main
import deit.train.engine
import deit.train.reporting
from deit.train.args import parse_args
from deit.train.build import build_model
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
    first, second = (json.loads(line) for line in (trained / "log.txt").read_text().splitlines())
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


def test_both_are_evaluated_and_the_best_of_each_is_kept(data, tmp_path, capsys):
    """The columns of each are those of a training that evaluates it alone."""
    options = ("--epochs", "3", "--model-ema-decay", "0.5", "--lr", "0.02", "--crop-pct", "0.9")
    cases = ("--no-model-ema-eval", "--model-ema-eval", "--model-ema-eval=both", "--no-model-ema")
    logs, best = [], []
    for number, how in enumerate(cases):
        out = tmp_path / str(number)
        # without an average there is nothing to evaluate but the weights
        both = ("--model-ema-eval", "both") if how == "--no-model-ema" else ()
        assert train(*options, how, *both, data=data, out=out) == 0
        logs.append([json.loads(line) for line in (out / "log.txt").read_text().splitlines()])
        best.append(load(out / "best_checkpoint.pth")["epoch"])
        assert (out / "best_checkpoint_ema.pth").exists() == (number == 2)
    keys = ("test_loss", "test_acc1", "test_acc5")
    for raw, average, both, none in zip(*logs, strict=True):
        assert [both[key] for key in keys] == [raw[key] for key in keys]
        assert [both[f"{key}_ema"] for key in keys] == [average[key] for key in keys]
        assert none | {"time": raw["time"]} == raw
    assert [r["test_loss"] for r in logs[0]] != [r["test_loss"] for r in logs[1]]
    out = tmp_path / "2"
    kept = load(out / "best_checkpoint_ema.pth")
    assert best[2] == best[0]
    assert kept["epoch"] == best[1] == kept["progress"]["best_ema_epoch"]
    capsys.readouterr()
    last = ("--resume", str(out / "checkpoint.pth"), "--eval", "--model-ema-eval", "both")
    assert train(*last, data=data) == 0
    output = capsys.readouterr().out
    assert output.count("taken from") == 1
    shown = re.findall(r"\* Acc@1 \S+ Acc@5 \S+ loss (\S+)", output)
    expected = [logs[2][-1]["test_loss"], logs[2][-1]["test_loss_ema"]]
    assert [float(loss) for loss in shown] == pytest.approx(expected, abs=1e-3)


def test_configuration_is_written_before_the_first_step(data, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(deit.train.engine.TrainingState, "update", fail)
    with pytest.raises(KeyboardInterrupt):
        train(data=data, out=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["args"]["model"] == "test_vit"
    assert config["environment"]["torch"] == torch.__version__
    assert (config["environment"]["device"], config["environment"]["processes"]) == ("cpu", 1)
    assert {"git_commit", "command", "started"} <= config["environment"].keys()
    assert (config["global_batch"], config["updates_per_epoch"]) == (4, 6)
    assert config["peak_learning_rate"] == 1e-3


def test_without_an_output_folder_nothing_is_written(data, tmp_path, monkeypatch, capsys):
    """ThreeAugment erases nothing, and says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deit.data.loader.erase", lambda *args: pytest.fail("erased"))
    assert train("--ThreeAugment", "--reprob", "1", "--epochs", "1", data=data) == 0
    assert list(tmp_path.iterdir()) == []
    output = capsys.readouterr().out
    assert "nothing is saved" in output
    assert "finished, " in output
    assert "--ThreeAugment has no erasing: --reprob 1 is ignored" in output


def test_frozen_and_fixed_parameters_stay(data, tmp_path):
    options = ("--model", "d2_deit_tiny_patch16_LS", "--model-kwargs", "depth=2", "--attn-only")
    assert train(*options, "--epochs", "1", "--seed", "3", data=data, out=tmp_path) == 0
    trained = load(tmp_path / "checkpoint.pth")["model"]
    seed_all(3)
    model, _ = build_model(parse_args([*TINY, *options]), 3)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, trained[k])}
    assert changed
    assert all(".attn." in key or key.startswith(("pos_embed", "head")) for key in changed)


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
    resident, files, threads = {}, {}, {}
    before = set(threading.enumerate())
    original = deit.train.reporting.Reporter.end_epoch

    def end_epoch(self, record):
        original(self, record)
        epoch = record["epoch"]
        rollup = Path("/proc/self/smaps_rollup").read_text()
        resident[epoch] = int(re.search(r"^Rss: +(\d+) kB", rollup, re.M)[1]) / 1024
        files[epoch] = len(os.listdir("/proc/self/fd"))
        threads[epoch] = set(threading.enumerate()) - before

    monkeypatch.setattr(deit.train.reporting.Reporter, "end_epoch", end_epoch)
    quick = ("--epochs", "40", "--num-workers", "1", "--batch-size", "26")
    assert train(*quick, data=data, out=tmp_path) == 0
    assert resident[39] - resident[9] < 10
    assert files[39] <= files[9] + 3  # a checkpoint may be being written
    assert len(threads[39]) == len(threads[9])


# evaluation


@pytest.mark.parametrize("how", ["whole checkpoint", "folded", "bare weights"])
def test_eval_prints_the_scores_of_the_training(how, data, trained, tmp_path, capsys):
    """It needs the test images alone."""
    (tmp_path / "val").symlink_to(data / "val")
    source, more = trained / "checkpoint.pth", ("--fold",) if how == "folded" else ()
    if how == "bare weights":
        torch.save(load(source)["model"], tmp_path / "bare.pth")
        source = tmp_path / "bare.pth"
    assert train("--eval", "--resume", str(source), "--flop-eval", *more, data=tmp_path) == 0
    last = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    lines = capsys.readouterr().out.splitlines()
    if how != "bare weights":
        assert lines[0] == f"note    {source}: the trained weights (model), not their average"
    assert lines[1:] == [
        f"* Acc@1 {last['test_acc1']:.3f} Acc@5 {last['test_acc5']:.3f} "
        f"loss {last['test_loss']:.3f} mirrored Acc@1 {last['test_flop_acc1']:.3f} "
        f"same answer {last['test_flop_same']:.3f}",
        f"Accuracy of the network on the {VAL_IMAGES} test images: {last['test_acc1']:.1f}%",
    ]


def test_files_that_are_not_read_are_counted_once(trained, tmp_path, capsys):
    data = make_images(tmp_path)
    image = (data / "val" / "class0" / "0.png").read_bytes()
    for split in ("train", "val"):
        (data / split / "class0" / "._0.png").write_bytes(image)
    (data / "val" / "class1" / "moving.gif").write_bytes(image)
    (data / "val" / "class0" / "loop").symlink_to(".")
    left_out = (
        f"not read in {data / 'val'}: .gif: 1, hidden files: 1, "
        "links to folders that are read already: 1"
    )
    assert train("--eval", "--resume", str(trained / "checkpoint.pth"), data=data) == 0
    output = capsys.readouterr().out
    assert output.count(f"note    {left_out}\n") == 1
    assert f"{VAL_IMAGES} test images" in output
    assert train("--epochs", "1", data=data) == 0
    output = capsys.readouterr().out
    assert output.count(left_out) == 1
    assert f"note    not read in {data / 'train'}: hidden files: 1\n" in output
    assert f"{TRAIN_IMAGES} training and {VAL_IMAGES} test images" in output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_on_a_gpu(dtype, data, tmp_path, capsys):
    options = ("--device", "cuda", "--amp-dtype", dtype, "--model", "d2_deit_tiny_patch16_LS")
    assert train(*options, "--fused-attn", data=data, out=tmp_path) == 0
    more = ("--resume", "auto", "--epochs", "3", "--model-ema-force-cpu")
    assert train(*options, *more, data=data, out=tmp_path) == 0
    assert f", {dtype}; " in capsys.readouterr().out
    checkpoint = load(tmp_path / "checkpoint.pth")
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert bool(checkpoint["scaler"]) == (dtype == "float16")
    assert checkpoint["processes"][0]["random"]["cuda"] is not None


# what is refused


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of files that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    torch.save({"model": {"a": torch.ones(1), "b": torch.ones(2)}}, folder / "foreign.pth")
    (folder / "file").touch()
    return folder


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data-path", "{tmp}/absent"], "absent"),
        (["--data-path", "{tmp}/empty"], "empty"),
        (["--model", "d2_deit_smal_patch16_LS"], "did you mean.*d2_deit_small_patch16_LS"),
        (["--resume", "{tmp}/absent.pth"], "absent.pth'.*does not exist"),
        (["--resume", "{tmp}/foreign.pth"], r"\d+ missing keys .*2 unexpected keys \(a, b\)"),
        (["--finetune", "{tmp}/foreign.pth"], "foreign.pth"),
        (["--model", "deit_tiny_patch16_LS", "--input-size", "40"], "32 or 48"),
        (["--model", "d2_convnext_tiny", "--input-size", "33"], "d2_convnext_tiny"),
        (["--model", "convnext_tiny", "--input-size", "20"], "cannot take images.* 20"),
        (["--model", "resmlp_12", "--input-size", "40"], "resmlp_12"),
        (["--layer-scale-init-value", "1"], "no option --layer-scale-init-value"),
        (["--nb-classes", "2"], "--nb-classes 2.*3 classes"),
        (["--batch-size", "30"], "26 images, fewer than one global batch of 30"),
        (["--update-freq", "9"], "global batch of 36"),
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
    status = train(*(word.format(tmp=bad) for word in argv), data=data)
    error = capfd.readouterr().err
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error


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


def test_broken_loss_says_where_and_what_to_try(data, again, capsys):
    before = (again / "checkpoint.pth").read_bytes()
    arguments = ("--lr", "1e30", "--resume", "auto", "--epochs", "3")
    assert train(*arguments, data=data, out=again) == 2
    error = capsys.readouterr().err
    assert re.search(r"infinite or NaN in epoch 3 at step \d \(update \d+\)", error)
    assert f"the last state is {again / 'checkpoint.pth'}" in error
    assert "--clip-grad" in error
    assert (again / "checkpoint.pth").read_bytes() == before


def test_full_disk_while_saving(data, again, monkeypatch, capsys):
    before = (again / "checkpoint.pth").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert train("--resume", "auto", "--epochs", "3", data=data, out=again) == 2
    error = capsys.readouterr().err
    last = re.escape(f"the last state is {again / 'checkpoint.pth'}, --resume auto goes on")
    assert re.fullmatch(rf"error: cannot save .*no space left on .*unchanged; {last}.*\n", error)
    assert not [path for path in again.iterdir() if path.name.startswith(".")]
    assert (again / "checkpoint.pth").read_bytes() == before


def test_script_runs_without_an_installation(tmp_path):
    command = [sys.executable, "deit/main.py", "--eval", "--resume", str(tmp_path / "no.pth")]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: no checkpoint at '.*no.pth': the file .*\n", done.stderr)
    assert done.stdout == ""
