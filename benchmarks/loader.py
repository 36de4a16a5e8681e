"""Images per second that reach the training loop: this package's loader and timm's in one run.

    python benchmarks/loader.py                     # a generated folder of JPEGs, one worker a core
    python benchmarks/loader.py --data /path/to/imagenet --workers 16 --rounds 5

Both loaders read the same JPEGs with the very same transform object (224 pixels, RandAugment,
flip), the same batch size and number of workers, and hand normalised float batches to the same
device. Each round times an epoch of one, then of the other; the order swaps from round to round.
Expected: a ratio (the median over the rounds) of at least 1. Other processes disturb the clock, so
that CPU time per image is shown too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader
from timm.data.dataset import ImageDataset as TimmDataset

from deit.cli import CommandLine, OptionGroup, number, output_file
from deit.data import DeviceLoader, ResumableBatchSampler, build_dataset, train_transform
from deit.data.transforms import Transform
from deit.errors import one_line_errors
from deit.measure.hardware import synchronize, versions
from deit.saving import write_text

CLASSES = 10
Epochs = Callable[[], Iterator]  # begins an epoch: its batches


def write_jpegs(root: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """`count` images of ImageNet's usual size, with the spectrum of photographs (1/f), as JPEGs."""
    generator = np.random.default_rng(0)
    width, height = size
    fx, fy = np.fft.rfftfreq(width), np.fft.fftfreq(height)[:, None]
    amplitude = 1 / np.maximum(np.hypot(fx, fy), 1 / width)
    for index in range(count):
        noise = np.fft.rfft2(generator.standard_normal((3, height, width)))
        values = np.fft.irfft2(noise * amplitude, s=(height, width))
        places = dict(axis=(1, 2), keepdims=True)
        pixels = 128 + 50 * (values - values.mean(**places)) / values.std(**places)
        folder = root / "train" / f"class{index % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.transpose(1, 2, 0).clip(0, 255).astype(np.uint8))
        image.save(folder / f"{index}.jpg", quality=90)


def ours(root: Path, transform: Transform, args: Namespace) -> Epochs:
    """One long stream, as in training; an epoch is a part of its batches."""
    dataset = build_dataset("train", root=root, transform=transform)
    epochs = args.rounds + 1
    sampler = ResumableBatchSampler(len(dataset), batch_size=args.batch_size, epochs=epochs)
    loader = DeviceLoader(dataset, sampler, device=args.device, num_workers=args.workers)
    batches = iter(loader)
    return lambda: (next(batches) for _ in range(sampler.steps_per_epoch))


def timms(root: Path, transform: Transform, args: Namespace) -> Epochs:
    """timm's loader with its prefetcher and its loader for many epochs, its fastest set-up."""
    dataset = TimmDataset(str(root / "train"))
    loader = create_loader(
        dataset,
        input_size=args.size,
        batch_size=args.batch_size,
        is_training=True,
        num_workers=args.workers,
        device=torch.device(args.device),
        pin_memory=args.device == "cuda",
        use_multi_epochs_loader=args.workers > 0,
    )
    dataset.transform = transform
    return lambda: iter(loader)


def cpu_seconds(pids: list[int]) -> float:
    """CPU seconds of this process and the workers `pids`, once these have filled their queues."""
    before, now = -1.0, 0.0
    while now - before > 0.015:  # this process ticks too
        time.sleep(0.3)
        before, now = now, sum(os.times()[:2])
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            now += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return now


def time_epoch(batches: Iterator, pids: list[int], device: str) -> tuple[float, float]:
    """(images per second, ms of CPU per image) of one epoch."""
    cpu, start = cpu_seconds(pids), time.perf_counter()
    count = sum(len(images) for images, _ in batches)
    synchronize(torch.device(device))
    seconds = time.perf_counter() - start
    return count / seconds, 1e3 * (cpu_seconds(pids) - cpu) / count


def compare(root: Path, args: Namespace) -> dict[str, Any]:
    """Alternate the loaders over args.rounds rounds, after one epoch each to warm up."""
    transform = train_transform(args.size)
    epochs, pids = {}, {}
    for name, build in {"ours": ours, "timm": timms}.items():
        before = set(multiprocessing.active_children())
        epochs[name] = build(root, transform, args)
        for _ in epochs[name]():
            pass
        pids[name] = [child.pid for child in set(multiprocessing.active_children()) - before]
    rates, costs = {"ours": [], "timm": []}, {"ours": [], "timm": []}
    for index in range(args.rounds):
        for name in sorted(epochs, reverse=index % 2 == 1):
            rate, cost = time_epoch(epochs[name](), pids[name], args.device)
            rates[name].append(rate / max(1, args.workers))
            costs[name].append(cost)
            print(f"round {index + 1}  {name}  {rates[name][-1]:8.1f} images/s per core  "
                  f"{cost:6.2f} ms of CPU per image")  # fmt: skip
    cpu = {name: median(values) for name, values in costs.items()}
    return {
        "images_per_second_per_core": {name: median(values) for name, values in rates.items()},
        "ratio": median(a / b for a, b in zip(rates["ours"], rates["timm"], strict=True)),
        "cpu_ms_per_image": cpu,
        "cpu_ratio": cpu["timm"] / cpu["ours"],
        "settings": {key: str(value) for key, value in vars(args).items()},
        "versions": versions("pillow") | {"cores": os.cpu_count()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandLine(description="Compare the loader with timm's.")
    group, whole = OptionGroup(parser, "benchmark"), number(int, 1)
    group.add("--data", Path, None, "DIR", "folder with train/<class>/*.jpg (default: made)")
    group.add("--images", whole, 1024, "N", "how many to generate")
    group.add("--size", whole, 224, "PIXELS", "side of the images that are handed over")
    group.add("--batch-size", whole, 64, "N", "images")
    group.add("--workers", number(int, 0), os.cpu_count(), "N", "of each loader")
    group.add("--rounds", whole, 8, "N", "epochs of each loader that are timed")
    group.add("--device", str, "cpu", "NAME", "where the batches go")
    group.add("--output", output_file(), None, "FILE", "write the result there as JSON too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        if args.data is None:
            write_jpegs(Path(made), args.images)
        result = compare(args.data or Path(made), args)
    for name, rate in result["images_per_second_per_core"].items():
        print(f"{name:5} {rate:8.1f} images/s per core")
    print(f"ours / timm: {result['ratio']:.3f} (by CPU time: {result['cpu_ratio']:.3f})")
    if args.output:
        write_text(args.output, json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
