"""The device: what it is, and the fastest that it multiplies matrices and copies memory."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from deit.measure.roofline import Ceilings

__all__ = ["available_memory", "describe", "measure_ceilings", "synchronize", "versions"]

PACKAGES = ("torch", "torchvision", "timm", "triton", "fvcore", "numpy")


def synchronize(device: torch.device) -> None:
    """Wait for all work that was given to the device."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if device.type == "cpu":
        return f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return device.type


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def available_memory() -> int | None:
    """Bytes of main memory that can be allocated now; None where that cannot be told."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of several large matrix products, and of several copies (read plus written).

    On random data: zeros draw less power, and some devices then run faster.
    """
    return Ceilings(_product_rate(device, dtype), _copy_rate(device))


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 2048 if device.type == "cpu" else 8192
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(x)
    seconds = _best(lambda: torch.mm(x, y, out=product), device)
    return 2 * size**3 / seconds


def _copy_rate(device: torch.device) -> float:
    # several times larger than any cache, and small beside the memory
    source = torch.randn(2 ** (26 if device.type == "cpu" else 28), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], object], device: torch.device, budget: float = 1.0) -> float:
    """Seconds of the fastest of at least five runs, after one that is not counted."""
    work()
    synchronize(device)
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 5 or spent < budget:
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds = time.perf_counter() - start
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
    return best
