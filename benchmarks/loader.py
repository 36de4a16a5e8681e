"""Images per second that reach the training loop: this package's loader and timm's in one run.

    python benchmarks/loader.py                     # a generated folder of JPEGs, one worker a core
    python benchmarks/loader.py --data /path/to/imagenet/train --workers 16 --rounds 5

Both loaders read the same JPEGs with the very same transform object (224 pixels, RandAugment,
flip), the same batch size and number of workers, and hand normalised float batches to the same
device. Each round times an epoch of one, then of the other; the order swaps from round to round.
Expected: a ratio (the median over the rounds) of at least 1. Other processes disturb the clock, so
that CPU time per image is shown too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_loader
from timm.data.dataset import ImageDataset as TimmDataset

from deit.data import ResumableBatchSampler, build_dataset, build_train_loader, train_transform
from deit.errors import one_line_errors

CLASSES = 10


def write_jpegs(root: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """`count` images of ImageNet's usual size, with the spectrum of photographs (1/f), as JPEGs."""
    generator = np.random.default_rng(0)
    width, height = size
    fx, fy = np.fft.rfftfreq(width), np.fft.fftfreq(height)[:, None]
    amplitude = 1 / np.maximum(np.hypot(fx, fy), 1 / width)
    for number in range(count):
        channels = []
        for _ in range(3):
            noise = np.fft.rfft2(generator.standard_normal((height, width)))
            values = np.fft.irfft2(noise * amplitude, s=(height, width))
            channels.append(128 + 50 * (values - values.mean()) / values.std())
        pixels = np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)
        folder = root / "train" / f"class{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)


def ours(root: Path, transform, args: argparse.Namespace):
    """One long stream, as in training; an epoch is a part of its batches."""
    dataset = build_dataset("train", root=root, transform=transform)
    epochs = args.rounds + 1
    sampler = ResumableBatchSampler(len(dataset), batch_size=args.batch_size, epochs=epochs)
    batches = iter(
        build_train_loader(dataset, sampler, device=args.device, num_workers=args.workers)
    )
    return lambda: (next(batches) for _ in range(sampler.steps_per_epoch))


def timms(root: Path, transform, args: argparse.Namespace):
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
    """CPU seconds so far of this process and of the workers `pids`."""
    total = sum(os.times()[:2])
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def settle(pids: list[int]) -> float:
    """Wait until the workers have filled their queues; CPU seconds of all processes by then."""
    before, now = -1.0, cpu_seconds(pids)
    while now - before > 0.015:  # this process ticks too
        time.sleep(0.3)
        before, now = now, cpu_seconds(pids)
    return now


def time_epoch(batches: Iterator, pids: list[int], device: str) -> tuple[float, float]:
    """(images per second, CPU seconds per image) of one epoch."""
    cpu, start, count = settle(pids), time.perf_counter(), 0
    for images, _ in batches:
        count += len(images)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return count / seconds, (settle(pids) - cpu) / count


def compare(root: Path, args: argparse.Namespace) -> dict:
    """Alternate the loaders over args.rounds rounds, after one epoch each to warm up."""
    transform = train_transform(args.size)
    names = {"ours": ours, "timm": timms}
    epochs, pids = {}, {}
    for name, build in names.items():
        before = set(multiprocessing.active_children())
        epochs[name] = build(root, transform, args)
        for _ in epochs[name]():
            pass
        pids[name] = [child.pid for child in set(multiprocessing.active_children()) - before]
    rates = {name: [] for name in names}
    costs = {name: [] for name in names}
    for round_number in range(args.rounds):
        for name in sorted(names, reverse=round_number % 2 == 1):
            rate, cost = time_epoch(epochs[name](), pids[name], args.device)
            rates[name].append(rate / max(1, args.workers))
            costs[name].append(cost)
            print(
                f"round {round_number + 1}  {name}  {rates[name][-1]:8.1f} images/s per core",
                end="",
            )
            print(f"  {1e3 * cost:6.2f} ms of CPU per image")
    median = {name: statistics.median(values) for name, values in rates.items()}
    by_round = [mine / theirs for mine, theirs in zip(rates["ours"], rates["timm"], strict=True)]
    cpu = {name: statistics.median(values) for name, values in costs.items()}
    return {
        "images_per_second_per_core": median,
        "ratio": statistics.median(by_round),
        "cpu_ms_per_image": {name: 1e3 * value for name, value in cpu.items()},
        "cpu_ratio": cpu["timm"] / cpu["ours"],
        "settings": {key: str(value) for key, value in vars(args).items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "cores": os.cpu_count(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the loader with timm's.")
    parser.add_argument("--data", type=Path, help="folder with train/<class>/*.jpg (default: made)")
    parser.add_argument("--images", type=int, default=1024, help="how many to generate")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the result there as JSON too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        if args.data is None:
            write_jpegs(Path(made), args.images)
        result = compare(args.data or Path(made), args)
    for name, rate in result["images_per_second_per_core"].items():
        print(f"{name:5} {rate:8.1f} images/s per core")
    print(f"ours / timm: {result['ratio']:.3f} (by CPU time: {result['cpu_ratio']:.3f})")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
