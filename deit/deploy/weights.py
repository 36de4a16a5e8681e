"""From chains of affine layers to one standard layer each.

Between two nonlinearities everything is affine: scales, shifts, linear layers, means that are
subtracted. Such a chain is not taken apart but run, on zeros and on the unit vectors. What comes
out are its bias and the columns of its weight. So adapters that are linear fold too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from deit.errors import UserError, one_line

__all__ = ["Map", "Pair", "affine_maps", "convolution", "exact", "linear", "pointwise", "times"]

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


def times(x: Pair, factor: float) -> Pair:
    """Both parts multiplied by a number."""
    return x[0] * factor, x[1] * factor


def affine_maps(chain: Callable[[Pair], Pair], width: int) -> tuple[Map, Map]:
    """What `chain`, of layers in float64, does to s and to a.

    Args:
        chain: from parts (N, width) to parts (N, out); it mixes neither rows nor parts.

    Raises:
        UserError: it is not affine, because a layer was replaced.
    """
    eye = torch.eye(width, dtype=torch.float64)
    probe = torch.linspace(-1, 2, width, dtype=torch.float64)[None]
    inputs = torch.cat([torch.zeros_like(probe), eye, probe])
    try:
        outputs = chain((inputs, inputs))
    except (RuntimeError, TypeError, AttributeError) as error:  # quantised layers take no float64
        raise UserError(f"{_REPLACED}: {one_line(error)[:200]}") from error
    maps = []
    for y in outputs:
        bias, weight = y[0], (y[1:-1] - y[0]).T
        error = (y[-1] - weight @ probe[0] - bias).norm()
        if error > 1e-9 * (weight.norm() * probe.norm() + bias.norm()):
            raise UserError(_REPLACED)
        # the group allows a no shift: there is none to add
        maps.append(Map(weight, None if maps and not bias.any() else bias))
    return tuple(maps)


_REPLACED = (
    "a layer that is not linear stands where a linear one was: fold the network before you "
    "quantise it"
)


def linear(map: Map) -> nn.Linear:
    """A linear layer over the last axis."""
    layer = nn.Linear(*map.weight.T.shape, bias=map.bias is not None, device="meta")
    return fill(layer, *map)


def pointwise(map: Map) -> nn.Conv2d:
    """A 1x1 convolution of images (B, in, H, W)."""
    return convolution(map.weight[..., None, None], map.bias)


def convolution(
    kernel: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
) -> nn.Conv2d:
    """A Conv2d of a kernel (out, in / groups, height, width)."""
    out, inputs, *size = kernel.shape
    layer = nn.Conv2d(
        inputs * groups, out, tuple(size), stride, padding, groups=groups, bias=bias is not None,
        device="meta",
    )  # fmt: skip
    return fill(layer, kernel, bias)


def fill(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Give a layer made on the meta device its parameters, which are not trained."""
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return layer
