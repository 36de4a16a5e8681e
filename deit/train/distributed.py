"""Many processes: which rank is this, where do they meet, how a model is spread.

Processes are started by torchrun or submitit (both set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT) or by plain srun (Slurm's own variables). Without any of these there is one process,
and everything here works for it too. Torch does the work: NCCL between GPUs, gloo between CPUs,
DDP or FSDP2 around the model. A process that dies is the launcher's affair: torchrun and srun name
it and end the others.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from deit.errors import EXIT_USER_ERROR, UserError, one_line

ARRIVAL = timedelta(minutes=5)
"""Processes may start so far apart."""
# FSDP2 records events in streams, which those of CPUs in torch 2.6 cannot.
SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@dataclass(frozen=True)
class RankInfo:
    """Which of the processes this is, and where all of them meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    url: str = "env://"
    """For `torch.distributed.rendezvous`: env://, tcp://HOST:PORT or file://PATH."""

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] = os.environ, *, url: str = "env://", world_size: int = 1
    ) -> RankInfo:
        """Read this process's rank from the environment of its launcher.

        Args:
            url: `--dist-url`. Anything but env:// says where to meet whatever the launcher is.
            world_size: `--world-size`, which must fit what the launcher says.

        Raises:
            UserError: the variables are incomplete, or contradict `world_size`.
        """
        if "RANK" in environ and "WORLD_SIZE" in environ:
            names = _TORCHRUN
        # a batch script has all of Slurm's variables but a step's
        elif "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
            names = _SRUN
            url = _url_of_step(environ) if url == "env://" else url
            absent = {"SLURM_STEP_NUM_TASKS": environ.get("SLURM_NTASKS", "none")}
            environ = absent | {"SLURM_LOCALID": "0"} | dict(environ)
        elif world_size > 1:
            raise UserError(
                f"--world-size {world_size}, but no launcher started the processes: use "
                f"torchrun --nproc-per-node {world_size} deit/main.py ..."
            )
        else:
            return cls(url=url)
        values = [environ.get(name, environ[names[0]]) for name in names]
        if not all(value.isdecimal() for value in values):
            raise UserError(f"{', '.join(names)} are {', '.join(values)}: not all are numbers")
        rank, size, local_rank = map(int, values)
        if world_size not in (1, size):
            raise UserError(f"--world-size {world_size}, but the launcher started {size} processes")
        if rank >= size:
            raise UserError(f"rank {rank} does not exist among {size} processes")
        return cls(rank, size, local_rank, url)


def _url_of_step(environ: Mapping[str, str]) -> str:
    """Where the tasks of a job step of Slurm meet, unless MASTER_ADDR and MASTER_PORT say it."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "localhost")
    # A port that all tasks of a step agree on, and two steps of a node hardly share.
    step = int(environ.get("SLURM_JOB_ID", "0")) * 7 + int(environ["SLURM_STEP_ID"])
    # The first of them: that of `gpu[03-05,9],n7` is `gpu03`.
    first = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]
    host = environ.get("MASTER_ADDR") or first
    return f"tcp://{host}:{environ.get('MASTER_PORT') or 20000 + step % 20000}"


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this process for `--device` (auto, cpu, cuda, cuda:N, mps, xpu).

    Raises:
        UserError: the device is not there.
    """
    there = torch.cuda.is_available()
    device = torch.device(("cuda" if there else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        if not there:
            built = "" if torch.version.cuda or torch.version.hip else " (this PyTorch has no CUDA)"
            raise UserError(
                f"--device {name}: no CUDA device is available{built}; use --device cpu"
            )
        count = torch.cuda.device_count()
        # Where a launcher shows each process its own GPU only, that one is number 0.
        index = device.index if device.index is not None else (0 if count == 1 else local_rank)
        if index >= count:
            raise UserError(f"process {index} of this node has no GPU: there are {count}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: no Apple GPU is available; use --device cpu")
    elif device.type == "xpu" and not torch.xpu.is_available():
        raise UserError(f"--device {name}: no Intel GPU is available; use --device cpu")
    return device


@dataclass
class DistContext:
    """The processes of a job after they have met; the collectives that training needs.

    Several are made by `connect`. With a single process every method is the trivial one.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    control: dist.ProcessGroup | None = None
    """A gloo group for host-side messages, so that they never wait for the GPU."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in the order of ranks, on every process."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body on rank 0 first: it may download what the others then find.

        Raises:
            UserError: that of rank 0, on all ranks.
        """
        if not self.is_main and (problem := self.gather(None)[0]) is not None:
            raise UserError(problem)
        try:
            yield
        except UserError as error:
            if self.is_main:
                with suppress(RuntimeError):  # another process hangs: the error comes first
                    self.gather(str(error))
            raise
        if self.is_main:
            self.gather(None)


@contextmanager
def connect(
    info: RankInfo, device: torch.device, timeout: timedelta, last: Path | None = None
) -> Iterator[DistContext]:
    """Meet the other processes; take everything down afterwards.

    Inside, a `UserError` that several processes find is raised by one of them. The others exit
    without a word, and with one line those whose collective broke because another process ended
    or hangs.

    Args:
        timeout: a collective that takes longer, because a process hangs, fails.
        last: the file that `--resume auto` goes on from, once it is there.
    """
    context = DistContext(device, info.rank, info.world_size)
    if info.world_size == 1:
        yield context
        return
    told = dist.PrefixStore("told", _meet(info, device, timeout))
    context.control = dist.new_group(backend="gloo", timeout=timeout)
    try:
        # Until here others may still look for addresses in the store, which rank 0 serves and
        # takes away with it when something is wrong.
        dist.barrier(group=context.control)
        yield context
        dist.barrier(group=context.control)
    except UserError as error:
        if _count(told, str(error)) != 1:
            raise SystemExit(EXIT_USER_ERROR) from None
        raise
    except (RuntimeError, ConnectionError) as error:
        text = one_line(error)
        broken = re.search("gloo|NCCL|pair closure|connection (closed|reset)", text, re.I)
        if not isinstance(error, dist.DistError) and not broken:
            raise
        waited = re.search("(?<!connection )timed out|timeout", text, re.I)
        # A process that hangs may be the one that serves the store.
        if not waited and _count(told, "any", 0) > 0:
            raise SystemExit(EXIT_USER_ERROR) from None
        # without the place in gloo's C++ source, and its general advice
        told_by_torch = re.sub(r"\[\S+:\d+\] |\. This is typically .*", "", text)[:300]
        what = f"lost the connection to another process, which may have ended: {told_by_torch}"
        if waited:
            minutes = timeout.total_seconds() / 60
            what = f"waited longer than --dist-timeout {minutes:g} (minutes) for another process"
        again = f"; {last} is the last state, --resume auto goes on from it"
        print(
            f"error: rank {info.rank} {what}{again if last and last.exists() else ''}",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(1) from None
    dist.destroy_process_group()


def _count(told: dist.Store, message: str, more: int = 1) -> int:
    """How often `message` was told, this time included.

    0 without an answer: rank 0, which serves the store, has ended, and told why.
    """
    try:
        told.add("any", more)
        return told.add(message, more)
    except (RuntimeError, OSError):
        return 0


def _meet(info: RankInfo, device: torch.device, timeout: timedelta) -> dist.Store:
    """Wait for all processes; returns the store that they share."""
    try:
        meeting = dist.rendezvous(info.url, info.rank, info.world_size, timeout=ARRIVAL)
        store, rank, world_size = next(meeting)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"the {info.world_size} processes cannot meet at {info.url}: {one_line(error)[:300]}"
        ) from error
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("default", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    return store


def wrap_ddp(model: nn.Module, processes: DistContext) -> nn.Module:
    """`model` with its gradients averaged over all processes (as it is for a single one)."""
    trainable = any(parameter.requires_grad for parameter in model.parameters())
    if processes.world_size == 1 or not trainable:
        return model
    # Of gradients of (1, 1, C) tokens. They are copied, which costs nothing at that size.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    devices = [processes.device.index] if processes.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    # Nothing else in these networks changes its buffers in training. The attribute has this name
    # in every version of torch, the argument has not.
    wrapped.broadcast_buffers = any(isinstance(module, _BatchNorm) for module in model.modules())
    return wrapped


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network: those of `model.blocks`, or of each of `model.stages`.

    They are modules whose forward is called. A stage, or a group of blocks, that is a container
    may be run module by module.
    """
    if hasattr(model, "blocks"):
        return _called(model.blocks)
    if hasattr(model, "stages"):
        return [b for stage in model.stages for b in _called(getattr(stage, "blocks", stage))]
    raise UserError(
        f"{type(model).__name__} has neither 'blocks' nor 'stages': omit --fsdp or --compile-blocks"
    )


def _called(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return [block for part in module for block in _called(part)]
    return [module]


def shard(model: nn.Module, processes: DistContext, dtype: torch.dtype | None = None) -> nn.Module:
    """Shard `model` in place with FSDP2, block by block. All ranks hold equal weights before.

    Args:
        dtype: what autocast computes in, None for none. Blocks then gather their weights in it,
            half the bytes; what surrounds them keeps the residual stream in float32, as without
            sharding, and gradients are summed in float32.

    Raises:
        UserError: this version of torch cannot do it on this device.
    """
    if processes.device.type == "cpu" and not SHARDS_ON_CPU:
        raise UserError(f"--fsdp: torch {torch.__version__} shards on GPUs only; use a later one")
    mesh = dist.device_mesh.init_device_mesh(processes.device.type, (processes.world_size,))
    summed = None if dtype is None else torch.float32
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=summed, cast_forward_inputs=False)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)
