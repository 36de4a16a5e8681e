"""From chains of affine layers to one standard layer each.

Between two nonlinearities everything is affine: scales, shifts, linear layers, means that are
subtracted. What stands before and after a linear layer is not taken apart but run: before it on
zeros and ones, after it on the bias and the columns of the weight. What stands in place of a linear
layer is run on the unit vectors, so adapters fold too if they are linear.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from math import sqrt
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from deit.errors import UserError, one_line
from deit.layers import Linear

Pair = tuple[Tensor, Tensor]
T = TypeVar("T", Tensor, nn.Module)


class Map(NamedTuple):
    """y = weight x + bias; (out, in) and (out,) or None, float64."""

    weight: Tensor
    bias: Tensor | None = None

    def chunk(self, count: int) -> Iterator[Map]:
        """The outputs in `count` equal parts."""
        biases = [None] * count if self.bias is None else self.bias.chunk(count)
        return map(Map, self.weight.chunk(count), biases)


def exact(value: T) -> T:
    """A copy in float64 on the CPU, so that folding rounds once, at its end."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to("cpu", torch.float64).eval()
    return value.detach().to("cpu", torch.float64, copy=True)


def times(factor: float) -> Callable[[Pair], Pair]:
    """The map that multiplies both parts by a number."""
    return lambda x: (x[0] * factor, x[1] * factor)


BUTTERFLY = times(sqrt(0.5))  # of GELU's change of basis, before and after it


def affine_maps(
    before: Callable[[Pair], Pair], layer: Linear, after: Callable[[Pair], Pair]
) -> tuple[Map, Map]:
    """What `layer`, in float64, with what stands around it does to s and to a.

    Args:
        before: scales and shifts each channel of parts (N, channels).
        after: affine on parts (N, channels); it mixes neither rows nor parts.

    Raises:
        UserError: the layer was replaced, or one of its blocks by what is not linear.
    """
    if type(layer) is not Linear:
        raise UserError(
            f"{type(layer).__name__} stands where an equivariant Linear was: put adapters around "
            "the layers inside that, or merge them"
        )
    ones = torch.ones(1, layer.in_rep.invariant, dtype=torch.float64)
    at_zero, at_one = before((0 * ones, 0 * ones)), before((ones, ones))
    rows = []  # the bias, and the bias plus each column of the weight
    for block, zero, one in zip(layer.blocks(), at_zero, at_one, strict=True):
        weight, bias = _block_map(block, zero.shape[-1])
        first = zero @ weight.T + (0.0 if bias is None else bias)
        rows.append(torch.cat([first, first + weight.T * (one - zero).T]))
    s, a = (Map((y[1:] - y[0]).T, y[0]) for y in after(tuple(rows)))
    # the group allows a no bias
    return s, a if a.bias.any() else Map(a.weight)


def _block_map(block: nn.Module, width: int) -> Map:
    """That of a linear layer, or of what stands in its place."""
    if type(block) is nn.Linear:
        return Map(block.weight, block.bias)
    eye = torch.eye(width, dtype=torch.float64)
    probe = torch.linspace(-1, 2, width, dtype=torch.float64)
    wrong = ("a layer that is not linear stands where a linear one was: fold the network before "
             "you quantise it")  # fmt: skip
    try:
        bias, *columns, y = block(torch.cat([0 * eye[:1], eye, probe[None]]))
    except RuntimeError as error:  # quantised layers take no float64
        raise UserError(f"{wrong}: {one_line(error)[:200]}") from error
    weight = (torch.stack(columns) - bias).T
    if (y - weight @ probe - bias).norm() > 1e-9 * (weight.norm() * probe.norm() + bias.norm()):
        raise UserError(wrong)
    return Map(weight, bias)


def linear(map: Map) -> nn.Linear:
    """A linear layer over the last axis."""
    layer = nn.Linear(*map.weight.T.shape, bias=map.bias is not None, device="meta")
    return fill(layer, *map)


def pointwise(map: Map) -> nn.Conv2d:
    """A 1x1 convolution of images (B, in, H, W)."""
    return convolution(map.weight[..., None, None], map.bias)


def convolution(kernel: Tensor, bias: Tensor | None, groups: int = 1, **options) -> nn.Conv2d:
    """A Conv2d of a kernel (out, in / groups, height, width); `options` are stride and padding."""
    out, inputs, *size = kernel.shape
    options |= {"groups": groups, "bias": bias is not None, "device": "meta"}
    return fill(nn.Conv2d(inputs * groups, out, tuple(size), **options), kernel, bias)


def fill(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Give a layer made on the meta device its parameters."""
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous())
    return layer
