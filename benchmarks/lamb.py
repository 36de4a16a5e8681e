"""How long does a LAMB update take, beside timm's, apex's, and a whole training step?

    python benchmarks/lamb.py                                    # ViT-S, batch 128, on a GPU
    python benchmarks/lamb.py --device cpu --batch-size 4 --input-size 64 --no-compile

Goal: at most 10 % of the training step (forward, backward and update) of ViT-S at batch 128.
All are timed in turns, several times over; the table shows medians.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import timm
import timm.optim
import torch
from torch.utils.benchmark import Timer

import deit.models  # noqa: F401 - registers the networks
from deit.cli import CommandLine, OptionGroup, number
from deit.errors import UserError, one_line, one_line_errors
from deit.models.inputs import check_image_size
from deit.train.lamb import Lamb
from deit.train.losses import build_criterion
from deit.train.optim import parameter_groups

GOAL = 10.0  # per cent of the training step
LR, WEIGHT_DECAY = 3e-3, 0.02


def optimizers(model: torch.nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Ours, timm's, and apex's where it is installed and the network is on a GPU."""

    def groups() -> list[dict]:
        return parameter_groups(model, WEIGHT_DECAY)

    found: dict[str, torch.optim.Optimizer] = {
        "deit": Lamb(groups(), lr=LR),
        "timm": timm.optim.Lamb(groups(), lr=LR),
    }
    if next(model.parameters()).is_cuda:
        try:
            from apex.optimizers import FusedLAMB

            found["apex"] = FusedLAMB(groups(), lr=LR)
        except (ImportError, RuntimeError):
            pass
    return found


def in_turns(jobs: dict[str, Callable[[], None]], rounds: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of each job; `Timer` warms up and waits for the device."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            timer = Timer("job()", globals={"job": job}, num_threads=torch.get_num_threads())
            times[name].append(timer.blocked_autorange(min_run_time=seconds).median)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Time, and print the table."""
    cuda = torch.cuda.is_available()
    parser = CommandLine(description=__doc__.splitlines()[0])
    options = OptionGroup(parser, "benchmark")
    options.add("--model", str, "deit_small_patch16_LS", "NAME", "network of the training step")
    options.add("--batch-size", number(int, low=1), 128, "N", "images in a training step")
    options.add("--input-size", number(int, low=1), 224, "PIXELS", "side of the images")
    options.add("--device", str, "cuda" if cuda else "cpu", "NAME", "where to run")
    options.add("--rounds", number(int, low=1), 5, "N", "turns of all candidates")
    options.add("--seconds", number(float, low=0.001), 0.5, "S", "shortest time for each turn")
    options.switch("--compile", "compile the network", default=cuda)
    args = parser.parse_args()

    device = torch.device(args.device)
    try:
        model = timm.create_model(args.model, img_size=args.input_size)
    except ValueError as error:
        raise UserError(f"--input-size {args.input_size}: {one_line(error)}") from error
    check_image_size(model, args.input_size, "--input-size", args.model)
    model = model.to(device)
    step = torch.compile(model) if args.compile else model
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)
    targets = torch.randint(model.num_classes, (args.batch_size,), device=device)
    criterion = build_criterion(bce=True)

    def forward_backward() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = criterion(step(images), targets)
        loss.backward()

    forward_backward()  # the optimizers need gradients
    candidates = optimizers(model)
    jobs = {name: optimizer.step for name, optimizer in candidates.items()}
    times = in_turns({"forward and backward": forward_backward} | jobs, args.rounds, args.seconds)

    backbone = times.pop("forward and backward")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}"
    print(f"{args.model}, batch {args.batch_size}, {args.input_size} pixels, {name}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}")
    print(f"forward and backward {backbone:9.3f} ms")
    for name, time in times.items():
        share = 100 * time / (backbone + time)
        print(f"LAMB by {name:12} {time:9.3f} ms   {share:5.1f} % of the training step")
    print(f"deit / timm          {times['deit'] / times['timm']:9.2f}")
    share = 100 * times["deit"] / (backbone + times["deit"])
    print(f"goal of {GOAL:g} %: {'met' if share <= GOAL else 'missed'}")


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
