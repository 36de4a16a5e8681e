"""Help for tests that train: a tiny data set, tiny networks, and trainings in other processes."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from deit.equivariance import randomize_
from deit.errors import one_line_errors
from deit.main import main
from deit.train.args import parse_args
from deit.train.optim import build_optimizer
from deit.train.stopping import forget_stop

CLASSES = 3
TRAIN_IMAGES, VAL_IMAGES = 26, 17

# Everything random in training is on by default: augmentation, mixup, erasing, stochastic depth.
TINY = (
    *("--model", "test_vit", "--input-size", "32", "--batch-size", "4", "--epochs", "2"),
    *("--num-workers", "0", "--device", "cpu", "--log-interval", "1000"),
    *("--threads", "1"),  # results depend on it, and children of a test have one
    *("--warmup-epochs", "0", "--lr", "1e-3", "--unscale-lr"),
)
# What makes gradients sums over images, independent of how these are split into batches.
PLAIN = (
    *("--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--smoothing", "0"),
    *("--opt", "sgd", "--no-repeated-aug"),
)


# The names of networks of each family, at their smallest for images of 32 pixels.
_SHALLOW = {"img_size": 32, "depth": 2}
TINY_NETWORKS: dict[str, dict[str, Any]] = {
    "d2_deit_tiny_patch16_LS": _SHALLOW,
    "hybrid_deit_tiny_patch16_LS": _SHALLOW,
    "deit_tiny_patch16_LS": _SHALLOW,
    "resmlp_equi_d2_12": _SHALLOW,
    "resmlp_12": _SHALLOW,
    "d2_convnext_isotropic_small": {"depth": 2},
    "convnext_isotropic_small": {"depth": 2},
    "d2_convnext_tiny": {"depths": (1, 2, 1, 1), "dims": (8, 16, 32, 64)},
    "convnext_tiny": {"depths": (1, 2, 1, 1), "dims": (8, 16, 32, 64)},
}


def make_images(folder: Path, train: int = TRAIN_IMAGES, val: int = VAL_IMAGES) -> Path:
    """An IMNET folder of so many small random images in train/ and val/, with unequal classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            label = number % CLASSES
            image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            image[..., label] //= 3  # something to learn
            path = folder / split / f"class{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


def train(
    *argv: str | Path, data: Path | str = "", out: Path | str = "", base: Sequence[str] = TINY
) -> int:
    """Run deit/main.py in this process, with its one-line errors; returns the exit status."""
    forget_stop()
    folders = ["--data-path", str(data)] if data else []
    words = [*base, *folders, "--output-dir", str(out), *map(str, argv)]
    return one_line_errors(lambda: main(parse_args(words)))


SMALL_VIT = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 8}


def save_network(
    path: Path | str, classes: int = 3, names: tuple[str, ...] | None = ("a", "b", "é"), **args: Any
) -> str:
    """A checkpoint of a small random network for images of 16 pixels, as a training leaves it.

    `names` are those of its classes, `args` further options of the training.
    """
    model = "d2_deit_tiny_patch16_LS"
    network = timm.create_model(model, img_size=16, num_classes=classes, **SMALL_VIT)
    args = {"model": model, "input_size": 16, "eval_crop_ratio": 0.8,
            "model_kwargs": [list(pair) for pair in SMALL_VIT.items()]} | args  # fmt: skip
    saved = {"model": randomize_(network).state_dict(), "args": args}
    torch.save(saved | ({"class_names": list(names)} if names else {}), path)
    return str(path)


def run(*argv: str | Path, **options: Any) -> str:
    """`train` to its end; returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert train(*argv, **options) == 0
    return printed.getvalue()


def refused(*argv: str | Path, **options: Any) -> str:
    """What `train` says in one line when it ends with status 2."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        assert train(*argv, **options) == 2
    (line,) = printed.getvalue().splitlines()
    assert line.startswith("error: ")
    return line


def load(path: Path) -> dict[str, Any]:
    """A checkpoint that our own training wrote."""
    return torch.load(path, weights_only=True)


def differences(one: Any, other: Any, where: str = "", tolerance: float = 0.0) -> list[str]:
    """The places in which two nested structures differ by more, running times aside."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = sorted({*one, *other} - {"time", "seconds", "args"}, key=str)
        found = [f"{where}/{key} is in one only" for key in keys if (key in one) != (key in other)]
        pairs = [(key, one[key], other[key]) for key in keys if key in one and key in other]
    elif isinstance(one, list | tuple) and len(one) == len(other):
        found, pairs = [], list(zip(range(len(one)), one, other, strict=True))
    else:
        if isinstance(one, torch.Tensor):
            same = one.shape == other.shape and torch.allclose(one, other, 0.0, tolerance)
        else:
            same = one == other or (isinstance(one, float) and abs(one - other) <= tolerance)
        return [] if same else [where]
    for key, a, b in pairs:
        found += differences(a, b, f"{where}/{key}", tolerance)
    return found


def at_call(owner: Any, name: str, number: int, action: Callable[..., object]) -> None:
    """Have `action` done with the arguments of the `number`-th call of a function, before it."""
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            action(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def strike(number: int, *args: Any) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["deit.main"])


def _in_child(body: Callable[..., int | None], args: tuple, env: dict[str, str], log: str) -> None:
    # Everything that the process prints, from C++ and at exit too.
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env)
    sys.exit(body(*args) or 0)


def free_port() -> int:
    """A TCP port that is free, and that the system does not give to anyone else by itself."""
    while True:
        port = random.SystemRandom().randrange(10000, 20000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return port


def run_processes(
    bodies: list[Callable[..., int | None]],
    args: tuple,
    folder: Path,
    timeout: float = 240,
    distributed: bool = True,
    frozen: int | None = None,
) -> list[tuple[int, str]]:
    """Run one function a process, as ranks that torchrun would have started.

    Args:
        timeout: seconds for all together; who takes longer is killed and has status -9.
        frozen: the rank that is killed when all others have ended.

    Returns:
        (exit status, output) of each.
    """
    port = free_port()
    processes = []
    for rank, body in enumerate(bodies):
        env = {}
        if distributed:
            env = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(len(bodies)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        log = folder / f"rank{rank}.out"
        log.unlink(missing_ok=True)
        process = _context.Process(target=_in_child, args=(body, args, env, str(log)))
        process.start()
        processes.append((process, log))
    deadline = time.monotonic() + timeout
    results = {}
    for rank in sorted(range(len(processes)), key=lambda rank: rank == frozen):
        process, log = processes[rank]
        if rank != frozen:
            process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
        results[rank] = (process.exitcode, log.read_text() if log.exists() else "")
    return [results[rank] for rank in range(len(processes))]


def optimizer_for(model: nn.Module, lr: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of these options, by default AdamW without weight decay."""
    defaults = vars(parse_args([])) | {"weight_decay": 0.0}
    return build_optimizer(model, Namespace(**(defaults | options)), lr)[0]
