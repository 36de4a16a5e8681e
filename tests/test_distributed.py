"""Several processes: where they meet, that they compute what one does, and how they die."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from training_runs import PLAIN, TINY, differences, load, run_processes, train

import deit.main
import deit.train.engine
from deit.errors import UserError
from deit.train.distributed import SHARDS_ON_CPU, RankInfo, choose_device, connect

ROOT = Path(__file__).parents[1]


# where and who


def torchrun(rank: str, **more: str) -> dict[str, str]:
    return {"RANK": rank, "WORLD_SIZE": "4", "LOCAL_RANK": "1"} | more


def srun(rank: str, **more: str) -> dict[str, str]:
    numbers = {"SLURM_PROCID": rank, "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    return (
        numbers | {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "n[1-2]"} | more
    )


@pytest.mark.parametrize(
    ("environ", "url", "place"),
    [
        ({}, "env://", RankInfo(0, 1, 0, "env://")),
        (torchrun("3"), "env://", RankInfo(3, 4, 1, "env://")),
        ({"RANK": "3", "WORLD_SIZE": "4"}, "env://", RankInfo(3, 4, 3, "env://")),
        (torchrun("3"), "tcp://n9:1234", RankInfo(3, 4, 1, "tcp://n9:1234")),
        (srun("2") | torchrun("3"), "env://", RankInfo(3, 4, 1, "env://")),
        # All ranks of a step agree, two steps do not clash.
        (srun("2"), "env://", RankInfo(2, 4, 0, "tcp://n1:20049")),
        (srun("3"), "env://", RankInfo(3, 4, 0, "tcp://n1:20049")),
        (srun("2", SLURM_STEP_ID="1"), "env://", RankInfo(2, 4, 0, "tcp://n1:20050")),
        (srun("2", SLURM_STEP_NODELIST="gpu[03-05,9],n7"), "env://",
         RankInfo(2, 4, 0, "tcp://gpu03:20049")),
        (srun("2", SLURM_STEP_NODELIST="rack[2,4]node[08-09]", MASTER_PORT="5"), "env://",
         RankInfo(2, 4, 0, "tcp://rack2node08:5")),
        (srun("2", MASTER_ADDR="host-1.example.org"), "env://",
         RankInfo(2, 4, 0, "tcp://host-1.example.org:20049")),
        # Older Slurms say the number of tasks by the job's variable alone.
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "MASTER_ADDR": "n1"},
         "env://", RankInfo(2, 4, 0, "tcp://n1:20000")),
        ({"SLURM_STEP_ID": "0"}, "env://", RankInfo()),
        # A batch script has its job's tasks, but nobody started the others.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "env://", RankInfo()),
    ],
)  # fmt: skip
def test_places(environ, url, place):
    assert RankInfo.from_env(environ, url=url) == place


@pytest.mark.parametrize(
    ("environ", "options", "message"),
    [
        ({}, {"world_size": 2}, "torchrun --nproc-per-node 2"),
        (torchrun("3"), {"world_size": 2}, "launcher started 4"),
        (torchrun("x"), {}, "RANK, WORLD_SIZE, LOCAL_RANK are x, 4, 1: not all are numbers"),
        (torchrun("4"), {}, "rank 4"),
    ],
)
def test_impossible_places(environ, options, message):
    with pytest.raises(UserError, match=message):
        RankInfo.from_env(environ, **options)


def test_nowhere_to_meet(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with (
        pytest.raises(UserError, match=r"4 processes cannot meet at env://: .*MASTER_\w+ expected"),
        connect(RankInfo(3, 4), torch.device("cpu"), timedelta(minutes=1)),
    ):
        pass


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


def train_ranks(count: int, *argv: str, data: Path, out: Path, body=train) -> None:
    body = functools.partial(body, *argv, data=data, out=out)
    out.mkdir(parents=True, exist_ok=True)
    for status, output in run_processes([body] * count, (), out):
        assert status == 0, output


MODEL = ("--model", "d2_deit_tiny_patch16_LS")
MODEL += ("--model-kwargs", "depth=2", "embed_dim=48", "num_heads=2")


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    assert train("--batch-size", "8", *MODEL, *PLAIN, data=data, out=out) == 0
    trained = load(out / "checkpoint.pth")  # the average has hardly moved
    moved = [(v - trained["model_ema"][k]).abs().max() for k, v in trained["model"].items()]
    assert max(moved) > 1e-3, "a hundred times what is tolerated"
    return out


shards_on_cpu = pytest.mark.skipif(not SHARDS_ON_CPU, reason="this torch shards on GPUs only")


@pytest.mark.parametrize(
    ("processes", "batch", "options"),
    [
        (2, "4", ()),
        pytest.param(2, "4", ("--fsdp",), marks=shards_on_cpu),
        (1, "2", ("--update-freq", "4")),
        (2, "2", ("--update-freq", "2")),
        pytest.param(2, "2", ("--update-freq", "2", "--fsdp"), marks=shards_on_cpu),
    ],
)
def test_images_of_an_update_may_be_split(processes, batch, options, data, one_process, tmp_path):
    """Over processes and over batches: one process with all of them in one batch does the same."""
    argv = ("--batch-size", batch, *MODEL, *PLAIN, *options)
    train_ranks(processes, *argv, data=data, out=tmp_path)
    assert weights_differ(one_process, tmp_path) < 1e-5
    assert losses(tmp_path) == pytest.approx(losses(one_process), abs=1e-5)
    ours, theirs = load(tmp_path / "checkpoint.pth"), load(one_process / "checkpoint.pth")
    assert len(ours["processes"]) == processes
    for index, state in theirs["optimizer"]["state"].items():
        for key, value in state.items():
            assert ours["optimizer"]["state"][index][key].shape == value.shape


@shards_on_cpu
def test_moving_between_numbers_of_processes(data, one_process, tmp_path):
    """Two sharded processes, stopped in an epoch, go on as one, and that as two in DDP."""
    argv = (*MODEL, *PLAIN, "--resume", "auto")
    stop = functools.partial(train_until, 1, 1, functools.partial(send_self, signal.SIGTERM))
    train_ranks(2, "--batch-size", "4", "--fsdp", *argv, data=data, out=tmp_path, body=stop)
    first = load(tmp_path / "checkpoint.pth")
    # All ranks agree on one step; agreeing takes one update more.
    assert (first["epoch"], first["step"], len(first["processes"])) == (-1, 2, 2)
    stop = functools.partial(train_until, 2, 0, functools.partial(send_self, signal.SIGTERM))
    train_ranks(1, "--batch-size", "8", *argv, data=data, out=tmp_path, body=stop)
    second = load(tmp_path / "checkpoint.pth")
    assert (second["epoch"], second["step"], len(second["processes"])) == (0, 1, 1)
    train_ranks(2, "--batch-size", "4", *argv, data=data, out=tmp_path)
    assert weights_differ(one_process, tmp_path) < 1e-5
    assert losses(tmp_path) == pytest.approx(losses(one_process), abs=1e-5)


def test_interrupted_ranks_resume_exactly(data, tmp_path):
    """With all the randomness of a training: dropout, mixup, erasing, on each rank its own."""
    options = ("--drop", "0.1", "--update-freq", "2", "--batch-size", "2")
    train_ranks(2, *options, data=data, out=tmp_path / "whole")
    out = tmp_path / "parts"
    body = functools.partial(train_until, 4, 1, functools.partial(send_self, signal.SIGTERM))
    train_ranks(2, *options, data=data, out=out, body=body)
    stopped = load(out / "checkpoint.pth")
    assert (stopped["epoch"], stopped["step"]) == (0, 2)
    train_ranks(2, *options, "--resume", "auto", data=data, out=out)
    whole = tmp_path / "whole" / "checkpoint.pth"
    assert differences(load(out / "checkpoint.pth"), load(whole)) == []


@pytest.mark.parametrize("options", [(), ("--batch-size", "16"), ("--no-dist-eval",)])
def test_evaluation_is_exact(options, data, one_process, tmp_path):
    """17 images over 3 processes in batches of 4 or 16: nothing counted twice or left out."""
    argv = (*MODEL, "--eval", "--resume", str(one_process / "checkpoint.pth"), *options)
    results = run_processes([functools.partial(train, *argv, data=data)] * 3, (), tmp_path)
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


def at_update(number: int, rank: int, action) -> None:
    """Have `action()` done by `rank` before its update `number` (from 1)."""
    original, calls = deit.train.engine.TrainingState.update, 0

    def update(*args):
        nonlocal calls
        calls += 1
        if calls == number and os.environ["RANK"] == str(rank):
            action()
        original(*args)

    deit.train.engine.TrainingState.update = update


def raise_defect() -> None:
    raise ValueError("a defect of rank 1")


def send_self(number: int) -> None:
    os.kill(os.getpid(), number)


def train_until(update: int, rank: int, action, *argv: str, data: Path, out: Path) -> int:
    at_update(update, rank, action)
    return train(*argv, data=data, out=out)


LOST = r"lost the connection to another process, which may have ended: (?!.*\.cc:).*"
WAITED = r"waited longer than --dist-timeout 0\.1 \(minutes\) for another process"


@pytest.mark.parametrize(
    ("update", "rank", "action", "told"),
    [
        (3, 1, functools.partial(send_self, signal.SIGKILL), LOST),
        (3, 0, functools.partial(send_self, signal.SIGKILL), LOST),
        # who waits for it longest tells so, and the others of the end of that process
        (3, 1, functools.partial(send_self, signal.SIGSTOP), f"({LOST}|{WAITED})"),
        (1, 1, raise_defect, LOST),
    ],
    ids=["kill 1", "kill 0", "freeze 1", "error 1"],
)
def test_a_rank_that_dies_ends_the_others(update, rank, action, told, data, tmp_path):
    out = tmp_path / "out"
    argv = ("--dist-timeout", "0.1")
    body = functools.partial(train_until, update, rank, action, *argv, data=data, out=out)
    frozen = rank if WAITED in told else None
    results = run_processes([body] * 3, (), tmp_path, frozen=frozen)
    last = out / "checkpoint.pth"
    again = "" if update == 1 else f"; {last} is the last state, --resume auto goes on from it"
    for other, (status, output) in enumerate(results):
        if other != rank:
            assert status == 1, output
            line = f"error: rank {other} {told}{re.escape(again)}\n"
            assert re.search(rf"(^|\n){line}$", output), output
            assert "Traceback" not in output
            assert again or "--resume" not in output
        elif action is raise_defect:
            assert "ValueError: a defect of rank 1\n" in output
    outputs = "".join(output for _, output in results)
    assert (re.search(WAITED, outputs) is not None) == (frozen is not None)
    assert last.exists() == (update > 1)
    if last.exists():  # the last but one, if the last was just being written
        saved = load(last)
        assert (saved["epoch"], saved["step"]) in ((-1, 2), (0, 0))


def train_after(action, *argv: str, data: Path) -> int:
    """Train, with `action(rank)` before anything is built."""
    original = deit.main.Run

    def build(*args):
        action(int(os.environ["RANK"]))
        return original(*args)

    deit.main.Run = build
    return train(*argv, data=data)


def fail_alone(rank: int) -> None:
    if rank == 1:
        raise UserError("own error of rank 1")
    if rank == 2:
        raise ValueError("a defect")


def test_errors_of_single_ranks_are_told(data, tmp_path):
    body = functools.partial(train_after, fail_alone, "--resume", "no.pth", data=data)
    results = run_processes([body] * 3, (), tmp_path)
    assert all(status for status, _ in results)
    assert results[1] == (2, "error: own error of rank 1\n")
    assert "ValueError: a defect\n" in results[2][1], results


def come_late(late: int, rank: int) -> None:
    if rank == late:
        time.sleep(1.5)


@pytest.mark.parametrize("late", [-1, 0, 2])
def test_a_wrong_input_is_told_once(late, data, tmp_path):
    late = functools.partial(come_late, late)
    body = functools.partial(train_after, late, "--resume", str(tmp_path / "no.pth"), data=data)
    results = run_processes([body] * 3, (), tmp_path)
    assert [status for status, _ in results] == [2, 2, 2], results
    output = "".join(output for _, output in results)
    assert output.startswith("error: no checkpoint")
    assert output.count("\n") == 1


KILLED = """
import os, signal, sys
sys.path[:0] = {paths}
from test_distributed import at_update, send_self
import deit.main
at_update(5, 1, lambda: send_self(signal.SIGKILL))
sys.exit(deit.main.command())
"""


@pytest.mark.slow
def test_torchrun(data, one_process, tmp_path):
    """The real launcher: it names a rank that is killed, and the run goes on at its last state."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(paths=[str(ROOT), str(ROOT / "tests")]))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    argv = [*TINY, *MODEL, *PLAIN, "--data-path", str(data), "--output-dir", str(out)]
    argv += ["--resume", "auto"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [str(script), *argv]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(r"exitcode +: -9", done.stderr), done.stderr
    assert re.search(r"rank +: 1", done.stderr), done.stderr
    train_ranks(2, *argv, data=data, out=out)
    assert weights_differ(one_process, out) < 1e-5
