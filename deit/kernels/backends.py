"""Where the Triton kernels can run; they load on first use, so Triton may be absent."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

__all__ = [
    "compiles_directly",
    "direct",
    "gelu_triton",
    "kernels_take",
    "linear_launch",
    "triton_runs",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"deit.kernels.{name}")
    except ImportError:
        return None


def gelu_triton() -> ModuleType | None:
    """The kernels of the nonlinearity, or None without Triton."""
    return _load("gelu_triton")


def linear_launch() -> ModuleType | None:
    """The kernels of the linear maps, or None without Triton."""
    return _load("linear_launch")


def direct() -> ModuleType | None:
    """The operations that compilers take apart, or None without Triton."""
    return _load("direct")


# Devices whose compiler was tried; see `deit.kernels.gpu.trust_compiler`.
trusted: set[torch.device] = set()


def compiles_directly(x: Tensor) -> bool:
    """Whether code is being compiled that launches the kernels for `x` by itself."""
    return torch.compiler.is_compiling() and x.dtype in DTYPES and _is_trusted(x.device)


@torch.compiler.assume_constant_result
def _is_trusted(device: torch.device) -> bool:
    return device in trusted


@functools.cache
def _device_runs(device: torch.device) -> bool:
    if device.type == "cpu":  # Triton's interpreter, for tests
        return os.environ.get("TRITON_INTERPRET") == "1"
    # The kernels were compiled for NVIDIA's compute capabilities 8.0 and 9.0, see
    # benchmarks/kernel_resources.py; older ones lack bfloat16 and asynchronous copies.
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def device_compiles(device: torch.device) -> bool:
    """Whether `torch.compile` could launch the kernels on this device."""
    available = device.type == "cuda" and torch.cuda.is_available()
    return available and _device_runs(device) and _load("gelu_triton") is not None


def kernels_take(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether device and dtype of a tensor suit the kernels, and Triton is installed."""
    return dtype in DTYPES and _device_runs(device) and _load("gelu_triton") is not None


def triton_runs(x: Tensor) -> bool:
    """Whether the kernels take `x`."""
    return kernels_take(x.device, x.dtype)
