"""The device and the software that numbers depend on."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy")


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
        name = _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
        return f"{name}, {torch.get_num_threads()} threads"
    return device.type


def versions(*more: str) -> dict[str, str | None]:
    """Versions of what the numbers depend on; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in (*PACKAGES, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def available_memory() -> int | None:
    """Bytes of main memory that can be allocated now; None where that cannot be told."""
    found = _proc("/proc/meminfo", "MemAvailable")
    return int(found.split()[0]) * 1024 if found else None


def _proc(path: str, key: str) -> str | None:
    """The first value of a key in one of Linux's files; None elsewhere."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), None)
