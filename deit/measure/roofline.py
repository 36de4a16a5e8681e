"""How fast a network could be on a device with measured ceilings.

The bound takes the matrix products and convolutions alone, one after the other. Each needs at
least the time of its arithmetic at the device's matrix rate and at least the time to read its
operands and to write its result at the device's bandwidth. Everything between them is taken to be
fused into them at no cost, and fused attention never writes its logits. No implementation made of
separate products that go to memory is faster; one that keeps data on chip or in a cache from one
product to the next could be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Bound", "Ceilings", "Product", "bound", "matrix_products"]


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: floating-point operations (two for a multiply-add) and bytes a second."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution of one image: multiply-adds, and elements moved.

    `moved` is read or written for each image, `weights` once a batch.
    """

    multiply_adds: int
    moved: int
    weights: int


@dataclass(frozen=True)
class Bound:
    """Images a second by the roofline, and the share of that time that arithmetic limits."""

    images_per_s: float
    arithmetic: float


def matrix_products(model: nn.Module, images: Tensor) -> list[Product]:
    """The products of `model(images)` for one image, which may be on the meta device."""
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        model(images)
    return recorder.products


def bound(
    products: Sequence[Product],
    batch: int,
    element_size: int,
    ceilings: Ceilings,
    *,
    training: bool = False,
) -> Bound:
    """The roofline bound for batches of `batch` images with elements of `element_size` bytes.

    A training step is taken as three times a forward pass: each product has two in the backward
    pass, for the gradients of its two operands. The optimizer is left out.
    """
    total = arithmetic = 0.0
    for product in products:
        compute = 2 * product.multiply_adds * batch / ceilings.flops_per_s
        traffic = (product.moved * batch + product.weights) * element_size / ceilings.bytes_per_s
        total += max(compute, traffic)
        arithmetic += compute if compute >= traffic else 0.0
    return Bound(batch / (total * (3 if training else 1)), arithmetic / total)


class _Recorder(TorchFunctionMode):
    """Notes the products among all calls of torch functions."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            self.products.append(_PRODUCTS[func](output, *args))
        return output


def _dense(output: Tensor, x: Tensor, weight: Tensor, *_: Any) -> Product:
    """x (..., K) with a weight that has K entries for each of its outputs."""
    depth = x.shape[-1]
    return Product(output.numel() * depth, x.numel() + output.numel(), weight.numel())


def _added(output: Tensor, bias: Tensor, x: Tensor, weight: Tensor, *_: Any) -> Product:
    return _dense(output, x, weight)


def _batched(output: Tensor, x: Tensor, y: Tensor, *_: Any) -> Product:
    if y.ndim == 2:
        return _dense(output, x, y)
    return Product(output.numel() * x.shape[-1], x.numel() + y.numel() + output.numel(), 0)


def _added_batched(output: Tensor, bias: Tensor, x: Tensor, y: Tensor, *_: Any) -> Product:
    return _batched(output, x, y)


def _convolution(output: Tensor, x: Tensor, weight: Tensor, *_: Any) -> Product:
    multiply_adds = output.numel() * prod(weight.shape[1:])
    return Product(multiply_adds, x.numel() + output.numel(), weight.numel())


def _attention(output: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Product:
    multiply_adds = k.shape[-2] * (q.numel() + output.numel())
    return Product(multiply_adds, q.numel() + k.numel() + v.numel() + output.numel(), 0)


_PRODUCTS: dict[Callable[..., Any], Callable[..., Product]] = {
    F.linear: _dense,
    torch.mm: _dense,
    torch.Tensor.mm: _dense,
    torch.addmm: _added,
    torch.matmul: _batched,
    torch.Tensor.matmul: _batched,
    torch.Tensor.__matmul__: _batched,
    torch.bmm: _batched,
    torch.baddbmm: _added_batched,
    torch.conv2d: _convolution,
    F.scaled_dot_product_attention: _attention,
}
