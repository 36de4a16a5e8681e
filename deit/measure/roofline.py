"""How fast a network could be on a device with measured peak rates.

The bound takes the matrix products and convolutions alone, one after the other. Each needs at
least the time of its arithmetic at the device's matrix rate and at least the time to read its
operands and to write its result at the device's bandwidth. Everything between them is taken to be
fused into them at no cost, and fused attention never writes its logits. No implementation made of
separate products that go to memory is faster. One that keeps data on chip or in a cache from one
product to the next could be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from deit.measure.flops import MatMul
from deit.measure.hardware import synchronize

__all__ = ["Bound", "PeakRates", "bound", "measure_peak_rates"]


@dataclass(frozen=True)
class PeakRates:
    """Measured rates: floating-point operations (two for a multiply-add) and bytes a second."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Bound:
    """Images a second by the roofline, and the share of that time that arithmetic limits."""

    images_per_s: float
    arithmetic: float


def measure_peak_rates(device: torch.device, dtype: torch.dtype) -> PeakRates:
    """The best of several large matrix products, and of several copies (read plus written).

    On random data: zeros draw less power, and some devices then run faster.
    """
    size = 2048 if device.type == "cpu" else 8192
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(x)
    flops_per_s = 2 * size**3 / _best(lambda: torch.mm(x, y, out=product), device)
    # several times larger than any cache, and small beside the memory
    source = torch.randn(2 ** (26 if device.type == "cpu" else 28), device=device)
    target = torch.empty_like(source)
    return PeakRates(flops_per_s, 2 * source.nbytes / _best(lambda: target.copy_(source), device))


def _best(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of at least five runs within a second, after one not counted."""
    samples: list[float] = []
    while len(samples) < 6 or sum(samples[1:]) < 1.0:
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        samples.append(time.perf_counter() - start)
    return min(samples[1:])


def bound(
    matmuls: Sequence[MatMul],
    batch: int,
    element_size: int,
    rates: PeakRates,
    *,
    training: bool = False,
) -> Bound:
    """The roofline bound for batches of `batch` images with elements of `element_size` bytes.

    A training step is taken as three times a forward pass: each product has two in the backward
    pass, for the gradients of its two operands. The optimizer is left out.
    """
    total = arithmetic = 0.0
    for matmul in matmuls:
        compute = 2 * matmul.multiply_adds * batch / rates.flops_per_s
        traffic = (matmul.moved * batch + matmul.weights) * element_size / rates.bytes_per_s
        total += max(compute, traffic)
        arithmetic += compute if compute >= traffic else 0.0
    return Bound(batch / (total * (3 if training else 1)), arithmetic / total)
