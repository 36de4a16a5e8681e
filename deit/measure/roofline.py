"""How fast a network could be on a device with measured peak rates.

The bound takes the matrix products and convolutions alone, one after the other. Each needs at
least the time of its arithmetic at the device's matrix rate and at least the time to read its
operands and to write its result at the device's bandwidth. Everything between them is taken to be
fused into them at no cost, and fused attention never writes its logits. No implementation made of
separate products that go to memory is faster. One that keeps data on chip or in a cache from one
product to the next could be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deit.measure.flops import MatMul
from deit.measure.timing import alternate

# A training step is taken as so many forward passes: each product has two in the backward pass,
# for the gradients of its two operands. The optimizer is left out.
TRAINING = 3


@dataclass(frozen=True)
class PeakRates:
    """Measured rates: floating-point operations (two for a multiply-add) and bytes a second."""

    flops_per_s: float
    bytes_per_s: float


def measure_peak_rates(device: torch.device, dtype: torch.dtype) -> PeakRates:
    """The best of several large matrix products, and of several copies (read plus written).

    On random data: zeros draw less power, and some devices then run faster.
    """
    size = 2048 if device.type == "cpu" else 8192
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(x)
    # several times larger than any cache, and small beside the memory
    source = torch.randn(2 ** (26 if device.type == "cpu" else 28), device=device)
    target = torch.empty_like(source)
    steps = {
        "multiply": lambda: torch.mm(x, y, out=product),
        "copy": lambda: target.copy_(source),
    }
    for step in steps.values():
        step()
    fastest = {name: min(t.samples) for name, t in alternate(steps, device, min_time=1.0).items()}
    return PeakRates(2 * size**3 / fastest["multiply"], 2 * source.nbytes / fastest["copy"])


def bound(
    matmuls: Sequence[MatMul], batch: int, element_size: int, rates: PeakRates
) -> tuple[float, float]:
    """The roofline for batches of `batch` images with elements of `element_size` bytes.

    Returns:
        Images a second in inference, and the share of that time that arithmetic limits.
    """
    total = arithmetic = 0.0
    for matmul in matmuls:
        compute = 2 * matmul.multiply_adds * batch / rates.flops_per_s
        traffic = (matmul.moved * batch + matmul.weights) * element_size / rates.bytes_per_s
        total += max(compute, traffic)
        arithmetic += compute if compute >= traffic else 0.0
    return batch / total, arithmetic / total
