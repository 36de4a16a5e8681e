"""Several processes: where they meet, that they compute what one does, and how they die."""

import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from training_runs import PLAIN, TINY, differences, load, make_images, run_processes, train

import deit.main
import deit.train.engine
import deit.train.watchdog
from deit.errors import UserError
from deit.train.distributed import SHARDS_ON_CPU, RankInfo, choose_device, first_host
from deit.train.watchdog import Watchdog

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data"))


# where and who


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[03-05,9],n7", "gpu03"),
        ("a,b", "a"),
        ("rack[2,4]node[08-09]", "rack2node08"),
        ("host-1.example.org", "host-1.example.org"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_JOB_NODELIST": "n[1-2]",
}


def test_places():
    assert RankInfo.from_env({}) == RankInfo(0, 1, 0, "env://", "localhost")
    assert RankInfo.from_env(TORCHRUN) == RankInfo(3, 4, 1, "env://", "n1")
    srun = RankInfo.from_env(SRUN)
    assert (srun.rank, srun.world_size, srun.local_rank, srun.address) == (2, 4, 0, "n1")
    assert re.fullmatch(r"tcp://n1:2\d{4}", srun.url)
    # All ranks of a step agree, two steps do not clash.
    assert RankInfo.from_env(SRUN | {"SLURM_PROCID": "0"}).url == srun.url
    assert RankInfo.from_env(SRUN | {"SLURM_STEP_ID": "1"}).url != srun.url
    # torchrun inside a Slurm job wins.
    assert RankInfo.from_env(SRUN | TORCHRUN) == RankInfo.from_env(TORCHRUN)
    elsewhere = RankInfo.from_env(TORCHRUN, url="tcp://n9:1234")
    assert (elsewhere.url, elsewhere.address) == ("tcp://n9:1234", "n9")


def test_a_batch_script_is_one_process():
    """It has SLURM_PROCID and SLURM_NTASKS of its job, but nobody started the other tasks."""
    batch = {key: value for key, value in SRUN.items() if "STEP" not in key}
    assert RankInfo.from_env(batch | {"SLURM_PROCID": "0"}).world_size == 1


@pytest.mark.parametrize(
    ("environ", "options", "message"),
    [
        ({}, {"world_size": 2}, "torchrun --nproc-per-node 2"),
        (TORCHRUN, {"world_size": 2}, "launcher started 4"),
        (TORCHRUN | {"RANK": "x"}, {}, "RANK is 'x'"),
        (TORCHRUN | {"RANK": "4"}, {}, "rank 4"),
        (TORCHRUN | {"MASTER_PORT": ""}, {}, "MASTER_PORT"),
    ],
)
def test_impossible_places(environ, options, message):
    with pytest.raises(UserError, match=message):
        RankInfo.from_env(environ, **options)


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(UserError, match="--device cuda: no CUDA device"):
            choose_device("cuda")


# the same result


def weights_differ(one: Path, other: Path) -> float:
    a, b = load(one / "checkpoint.pth"), load(other / "checkpoint.pth")
    assert a["model"].keys() == b["model"].keys()
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in b["model"])
    return max(
        (a[part][key].double() - b[part][key].double()).abs().max().item()
        for part in ("model", "model_ema")
        for key in a["model"]
    )


def losses(folder: Path) -> list[float]:
    history = load(folder / "checkpoint.pth")["progress"]["history"]
    return [record[key] for record in history for key in ("train_loss", "test_loss", "test_acc1")]


def train_ranks(count: int, *argv: str, data: Path, out: Path) -> None:
    body = functools.partial(train, *argv, data=data, out=out)
    out.mkdir(parents=True, exist_ok=True)
    for status, output in run_processes([body] * count, (), out):
        assert status == 0, output


MODEL = ("--model", "d2_deit_tiny_patch16_LS")


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    assert train("--batch-size", "8", *MODEL, *PLAIN, data=data, out=out) == 0
    return out


shards_on_cpu = pytest.mark.skipif(not SHARDS_ON_CPU, reason="this torch shards on GPUs only")


@pytest.mark.parametrize(
    "options", [(), pytest.param(("--fsdp",), marks=shards_on_cpu)], ids=["ddp", "fsdp"]
)
def test_two_processes_train_as_one(options, data, one_process, tmp_path):
    train_ranks(2, "--batch-size", "4", *MODEL, *PLAIN, *options, data=data, out=tmp_path / "two")
    assert weights_differ(one_process, tmp_path / "two") < 1e-5
    assert losses(tmp_path / "two") == pytest.approx(losses(one_process), abs=1e-5)
    ours, theirs = load(tmp_path / "two/checkpoint.pth"), load(one_process / "checkpoint.pth")
    for key, state in theirs["optimizer"]["state"].items():
        assert ours["optimizer"]["state"][key].keys() == state.keys()
        for name, value in state.items():
            assert ours["optimizer"]["state"][key][name].shape == value.shape
    # Not vacuous: the training changes the weights by far more than that.
    state = {k: v + 1e-4 for k, v in theirs["model"].items() if v.is_floating_point()}
    assert max((ours["model"][k] - v).abs().max() for k, v in state.items()) > 5e-5


def test_accumulation_is_a_larger_batch(data, one_process, tmp_path):
    options = ("--batch-size", "2", "--update-freq", "4", *MODEL, *PLAIN)
    assert train(*options, data=data, out=tmp_path / "one") == 0
    assert weights_differ(one_process, tmp_path / "one") < 1e-5
    half = ("--batch-size", "2", "--update-freq", "2", *MODEL, *PLAIN)
    train_ranks(2, *half, data=data, out=tmp_path / "two")
    assert weights_differ(one_process, tmp_path / "two") < 1e-5


def stop_after(update: int, *argv: str, data: Path, out: Path) -> int:
    """Train until a signal that reaches only the last rank."""
    original = deit.train.engine.TrainStep.update
    calls = 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == update and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        original(*args)

    deit.train.engine.TrainStep.update = interrupted
    return train(*argv, data=data, out=out)


@shards_on_cpu
def test_moving_between_numbers_of_processes(data, one_process, tmp_path):
    """Stop two sharded processes in mid-epoch, go on with one, stop, end with two in DDP."""
    options = (*MODEL, *PLAIN)
    body = functools.partial(
        stop_after, 1, "--batch-size", "4", "--fsdp", *options, data=data, out=tmp_path
    )
    for status, output in run_processes([body] * 2, (), tmp_path):
        assert status == 0, output
    first = load(tmp_path / "checkpoint.pth")
    # All ranks agree on one step; agreeing takes one update more.
    assert (first["epoch"], first["step"]) == (-1, 2)
    assert len(first["processes"]) == 2
    arguments = (*options, "--resume", "auto")
    assert train("--batch-size", "8", *arguments, "--epochs", "1", data=data, out=tmp_path) == 0
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 0
    train_ranks(2, "--batch-size", "4", *arguments, data=data, out=tmp_path)
    # The learning rates of the middle part were those of a shorter training.
    assert weights_differ(one_process, tmp_path) < 1e-3
    history = load(tmp_path / "checkpoint.pth")["progress"]["history"]
    assert [record["epoch"] for record in history] == [0, 1]
    assert history[0]["train_loss"] == pytest.approx(losses(one_process)[0], abs=1e-5)


def test_interrupted_ranks_resume_exactly(data, tmp_path):
    """With all the randomness of a training: dropout, mixup, erasing, on each rank its own."""
    options = ("--drop", "0.1", "--update-freq", "2", "--batch-size", "2")
    train_ranks(2, *options, data=data, out=tmp_path / "whole")
    out = tmp_path / "parts"
    out.mkdir()
    body = functools.partial(stop_after, 4, *options, data=data, out=out)
    for status, output in run_processes([body] * 2, (), out):
        assert status == 0, output
    stopped = load(out / "checkpoint.pth")
    assert (stopped["epoch"], stopped["step"]) == (0, 2)
    train_ranks(2, *options, "--resume", "auto", data=data, out=out)
    whole = tmp_path / "whole" / "checkpoint.pth"
    assert differences(load(out / "checkpoint.pth"), load(whole)) == []


def evaluate_on_ranks(*argv: str) -> int:
    from deit.errors import one_line_errors
    from deit.main import main
    from deit.train.args import parse_args

    return one_line_errors(lambda: main(parse_args([*TINY, *argv])))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("options", [(), ("--batch-size", "16"), ("--no-dist-eval",)])
def test_evaluation_is_exact(count, options, data, one_process, tmp_path, capfd):
    """17 images over 3 processes in batches of 4 or 16: nothing counted twice or left out."""
    argv = ("--eval", "--data-path", str(data), "--resume", str(one_process / "checkpoint.pth"))
    body = functools.partial(evaluate_on_ranks, *MODEL, *argv, *options)
    results = run_processes([body] * count, (), tmp_path)
    for status, output in results:
        assert status == 0, output
    last = load(one_process / "checkpoint.pth")["progress"]["history"][-1]
    found = re.search(r"\* Acc@1 (\S+) Acc@5 (\S+) loss (\S+)\n", results[0][1])
    assert found, results[0][1]
    expected = [last["test_acc1"], last["test_acc5"], last["test_loss"]]
    assert [float(x) for x in found.groups()] == pytest.approx(expected, abs=6e-4)
    assert "Accuracy of the network on the 17 test images: " in results[0][1]
    assert all("Acc@1" not in output for _, output in results[1:])


# dying


def doomed(way: str, data: Path, out: Path) -> int:
    """Train; rank 1 comes to grief at its third update."""
    deit.train.watchdog.INTERVAL, deit.train.watchdog.SILENCE = 1.0, 8.0
    original = deit.train.engine.TrainStep.update
    calls = 0

    def update(*args):
        nonlocal calls
        calls += 1
        if calls == 3 and os.environ["RANK"] == way[-1]:
            if way.startswith("error"):
                raise ValueError("a defect of rank 1")
            os.kill(os.getpid(), signal.SIGKILL if way.startswith("kill") else signal.SIGSTOP)
        original(*args)

    deit.train.engine.TrainStep.update = update
    return train(data=data, out=out)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("kill 1", "rank 1 on .* has been silent"),
        ("freeze 1", "rank 1 on .* has been silent"),
        ("error 1", "rank 1 on .* failed: ValueError: a defect of rank 1"),
        ("kill 0", "rank 0 on .* cannot be reached"),
    ],
)
def test_a_rank_that_dies_ends_the_others_and_is_named(way, message, data, tmp_path):
    dead = int(way[-1])
    body = functools.partial(doomed, way, data, tmp_path / "out")
    results = run_processes([body] * 3, (), tmp_path, frozen=dead if "freeze" in way else None)
    for rank, (status, output) in enumerate(results):
        if rank != dead:
            assert status == 1, output
            assert re.search(f"error: {message}", output), output
    if "error" in way:
        assert "Traceback" in results[dead][1]


def fail_beside(data: Path) -> int:
    """Rank 0 has a wrong input while rank 1 trains and rank 2 is stopped."""
    deit.train.watchdog.INTERVAL, deit.train.watchdog.SILENCE = 1.0, 8.0
    original = deit.main.build_run

    def build_run(*args):
        if os.environ["RANK"] == "2":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(2 if os.environ["RANK"] == "0" else 600)
        return original(*args)

    deit.main.build_run = build_run
    return train("--resume", "no.pth", data=data)


def fail_each(data: Path) -> int:
    def build_run(*args):
        rank = int(os.environ["RANK"])
        time.sleep(rank)
        raise UserError(f"own error of rank {rank}") if rank < 2 else ValueError("a defect")

    deit.main.build_run = build_run
    return train(data=data)


def test_an_error_is_told_before_a_launcher_ends_the_process(data, tmp_path):
    body = functools.partial(fail_beside, data)
    results = run_processes([body] * 3, (), tmp_path, frozen=2, launcher=True)
    assert "error: no checkpoint" in results[0][1], results
    assert "error" not in results[1][1], results


def test_each_error_is_told(data, tmp_path):
    body = functools.partial(fail_each, data)
    results = run_processes([body] * 3, (), tmp_path, launcher=True)
    for rank in (0, 1):
        assert results[rank][1].count(f"error: own error of rank {rank}\n") == 1, results
    assert "ValueError: a defect\n" in results[2][1], results


def end_with_full_disk() -> None:
    with open("/dev/full", "w") as full:
        os.dup2(full.fileno(), 1)
        os.dup2(full.fileno(), 2)
    print("still in a buffer", end="")
    watchdog = object.__new__(Watchdog)
    watchdog.rank, watchdog._host, watchdog._error = 1, "here", None
    watchdog._closing = threading.Event()
    watchdog._exit("rank 0 is gone")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_keeps_no_process_alive(tmp_path):
    ((status, _),) = run_processes([end_with_full_disk], (), tmp_path, timeout=60)
    assert status == 1


def resume_late(rank: int, *argv: str, data: Path) -> int:
    """Train, but `rank` takes long before it looks for the checkpoint."""
    original = deit.main.build_run

    def build_run(*args):
        if os.environ["RANK"] == str(rank):
            time.sleep(5)
        return original(*args)

    deit.main.build_run = build_run
    return train(*argv, data=data)


@pytest.mark.parametrize("late", [-1, 0, 2])
def test_a_wrong_input_is_told_once(late, data, tmp_path):
    body = functools.partial(resume_late, late, "--resume", str(tmp_path / "no.pth"), data=data)
    results = run_processes([body] * 3, (), tmp_path)
    assert [status for status, _ in results] == [2, 2, 2], results
    assert "".join(output for _, output in results).count("error: no checkpoint") == 1
    assert results[0][1].count("\n") == 1, results


@pytest.mark.slow
def test_torchrun(data, one_process, tmp_path):
    """The real launcher, from the command line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "deit/main.py"]
    argv = [*TINY, *MODEL, *PLAIN, "--data-path", str(data), "--output-dir", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *argv], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert weights_differ(one_process, tmp_path) < 1e-5
