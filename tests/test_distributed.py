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
import torch.distributed as dist
from training_runs import (
    PLAIN,
    TINY,
    at_call,
    differences,
    load,
    run_processes,
    strike,
    train,
)

import deit.main
from deit.errors import UserError
from deit.train.distributed import SHARDS_ON_CPU, RankInfo, connect
from deit.train.engine import TrainingState

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


# the same result


def assert_same_training(out: Path, other: Path) -> None:
    """The same up to rounding."""
    ours, theirs = load(out / "checkpoint.pth"), load(other / "checkpoint.pth")
    for part in ("model", "model_ema", "optimizer", "progress"):
        assert differences(ours[part], theirs[part], part, tolerance=1e-5) == []


def train_ranks(count: int, *argv: str, data: Path, out: Path, body=train) -> None:
    body = functools.partial(body, *argv, data=data, out=out)
    out.mkdir(parents=True, exist_ok=True)
    for status, output in run_processes([body] * count, (), out):
        assert status == 0, output


MODEL = ("--model", "d2_deit_tiny_patch16_LS")
MODEL += ("--model-kwargs", "depth=2", "embed_dim=48", "num_heads=2", "--lr", "2e-3")


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    assert train("--batch-size", "8", *MODEL, *PLAIN, data=data, out=out) == 0
    trained = load(out / "checkpoint.pth")  # the average has hardly moved
    moved = [(v - trained["model_ema"][k]).abs().max() for k, v in trained["model"].items()]
    assert max(moved) > 1e-3, "a hundred times what is tolerated"
    return out


def train_until(update: int, rank: int, action, *argv: str, data: Path, out: Path) -> int:
    """Train, with `action` done by one rank before one of its updates (from 1)."""
    if os.environ["RANK"] == str(rank):
        at_call(TrainingState, "update", update, action)
    return train(*argv, data=data, out=out)


def stopped(update: int, rank: int, count: int, *argv: str, data: Path, out: Path) -> tuple:
    """Train until one rank is told to stop; returns epoch and step, and who saved its state."""
    body = functools.partial(train_until, update, rank, functools.partial(strike, signal.SIGTERM))
    train_ranks(count, *argv, data=data, out=out, body=body)
    checkpoint = load(out / "checkpoint.pth")
    return checkpoint["epoch"], checkpoint["step"], len(checkpoint["processes"])


def test_moving_between_numbers_of_processes(data, one_process, tmp_path):
    """Two in DDP, stopped in an epoch, go on as one, and that as two that are sharded.

    Images of an update are split over processes and batches, and over batches alone: the result is
    that of one process which has all of them in one batch.
    """
    argv = (*MODEL, *PLAIN, "--resume", "auto", "--batch-size", "2", "--update-freq")
    # All ranks agree on one step; agreeing takes one update more.
    assert stopped(1, 1, 2, *argv, "2", data=data, out=tmp_path) == (-1, 2, 2)
    assert stopped(2, 0, 1, *argv, "4", data=data, out=tmp_path) == (0, 1, 1)
    sharded = ("--fsdp",) if SHARDS_ON_CPU else ()
    train_ranks(2, *argv, "2", *sharded, data=data, out=tmp_path)
    assert len(load(tmp_path / "checkpoint.pth")["processes"]) == 2
    assert_same_training(tmp_path, one_process)


def test_interrupted_ranks_resume_exactly(data, tmp_path):
    """With all the randomness of a training: dropout, mixup, erasing, on each rank its own."""
    options = ("--drop", "0.1", "--update-freq", "2", "--batch-size", "2")
    whole, out = tmp_path / "whole", tmp_path / "parts"
    train_ranks(2, *options, data=data, out=whole)
    assert stopped(4, 1, 2, *options, data=data, out=out) == (0, 2, 2)
    train_ranks(2, *options, "--resume", "auto", data=data, out=out)
    ours, theirs = load(out / "checkpoint.pth"), load(whole / "checkpoint.pth")
    assert differences(ours, theirs) == []
    assert differences(*(state["random"]["torch"] for state in ours["processes"])) != []


@pytest.mark.parametrize("options", [(), ("--batch-size", "16"), ("--no-dist-eval",)])
def test_evaluation_is_exact(options, data, one_process, tmp_path):
    """17 images over 3 processes in batches of 4 or 16: nothing counted twice or left out."""
    argv = (*MODEL, "--eval", "--resume", str(one_process / "checkpoint.pth"), *options)
    results = run_processes([functools.partial(train, *argv, data=data)] * 3, (), tmp_path)
    assert [status for status, _ in results] == [0, 0, 0], results
    last = load(one_process / "checkpoint.pth")["progress"]["history"][-1]
    scores = re.findall(r"\* Acc@1 (\S+) Acc@5 (\S+) loss (\S+)\n", "".join(o for _, o in results))
    expected = [last["test_acc1"], last["test_acc5"], last["test_loss"]]
    assert [[float(x) for x in each] for each in scores] == [pytest.approx(expected, abs=6e-4)]
    assert "Accuracy of the network on the 17 test images: " in results[0][1]


# dying


def raise_defect(*args) -> None:
    raise ValueError("a defect of rank 1")


LOST = r"lost the connection to another process, which may have ended: (?!.*(\.cc:|GLHF)).*"
WAITED = r"waited longer than --dist-timeout 0\.1 \(minutes\) for another process"


@pytest.mark.parametrize(
    ("update", "rank", "action", "told"),
    [
        (3, 1, functools.partial(strike, signal.SIGKILL), LOST),
        (3, 0, functools.partial(strike, signal.SIGKILL), LOST),
        # who waits for it longest tells so, and the others of the end of that process
        (3, 1, functools.partial(strike, signal.SIGSTOP), f"({LOST}|{WAITED})"),
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
    at_call(deit.main, "Run", 1, lambda *_: action(int(os.environ["RANK"])))
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


def meet_late(met: Path) -> int:
    """Rank 1 is late to learn that it has met the others; who goes on before that returns 1."""

    def new_group(meet=dist.new_group, **options):
        group = meet(**options)
        if os.environ["RANK"] == "1":
            time.sleep(1)
            met.touch()
        return group

    dist.new_group = new_group
    with connect(RankInfo.from_env(), torch.device("cpu"), timedelta(minutes=1)):
        return int(not met.exists())


def test_nobody_goes_on_before_all_have_met(tmp_path):
    """Rank 0 might fail, and take away the store in which another one still looks for addresses."""
    assert run_processes([meet_late] * 2, (tmp_path / "met",), tmp_path) == [(0, "")] * 2


KILLED = """
import functools, os, signal, sys
sys.path[:0] = {paths}
from training_runs import at_call, strike
import deit.main
from deit.train.engine import TrainingState
if os.environ["RANK"] == "1":
    at_call(TrainingState, "update", 5, functools.partial(strike, signal.SIGKILL))
sys.exit(deit.main.command())
"""


@pytest.mark.slow
def test_torchrun(data, one_process, tmp_path):
    """The real launcher: it names a rank that is killed, and the run goes on at its last state."""
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(KILLED.format(paths=[str(ROOT), str(ROOT / "tests")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)]
    argv = [*TINY, *MODEL, *PLAIN, "--data-path", str(data), "--output-dir", str(out)]
    argv += ["--resume", "auto"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *argv], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(r"rank +: 1(.|\n)*exitcode +: -9", done.stderr), done.stderr
    train_ranks(2, *argv, data=data, out=out)
    assert_same_training(out, one_process)
