"""The arithmetic of folding: affine maps in float64, and the standard layers made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deit.errors import UserError
from deit.layers import Linear

__all__ = ["Weights", "convolution", "exact", "linear_pair"]


def exact(tensor: Tensor) -> Tensor:
    """A copy in float64 on the CPU, so that folding rounds once, at its end; any shape."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


@dataclass(frozen=True)
class Weights:
    """y = weight x + bias; (out, in) and (out,) or None, float64."""

    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> Weights:
        """Those of a linear layer.

        Raises:
            UserError: if the layer was replaced, as adapters and quantisers do: what the
                replacement adds would be lost.
        """
        if type(layer) is not nn.Linear and not nn.utils.parametrize.is_parametrized(layer):
            raise UserError(
                f"a {type(layer).__name__} stands where a linear layer was: fold the network "
                "before you quantise it, and merge adapters into its weights before you fold it"
            )
        return cls(exact(layer.weight), None if layer.bias is None else exact(layer.bias))

    def reading(self, alpha: Tensor | float, beta: Tensor | None = None) -> Weights:
        """The map of x that this one is of alpha x + beta."""
        bias = self.bias
        if beta is not None:
            shift = self.weight @ beta
            bias = shift if bias is None else bias + shift
        return Weights(self.weight * alpha, bias)

    def centring(self) -> Weights:
        """The map of x that this one is of x minus its mean."""
        return replace(self, weight=self.weight - self.weight.mean(1, keepdim=True))

    def times(self, factor: Tensor | float) -> Weights:
        """The outputs multiplied by `factor`, one number or (out,)."""
        column = factor[:, None] if isinstance(factor, Tensor) else factor
        return Weights(self.weight * column, None if self.bias is None else self.bias * factor)

    def centred(self, wanted: bool = True) -> Weights:
        """The outputs minus their mean, if it is wanted."""
        if not wanted:
            return self
        bias = None if self.bias is None else self.bias - self.bias.mean()
        return Weights(self.weight - self.weight.mean(0), bias)

    def rows(self, rows: slice) -> Weights:
        """Some of the outputs."""
        return Weights(self.weight[rows], None if self.bias is None else self.bias[rows])

    def linear(self) -> nn.Linear:
        """As a linear layer over the last axis."""
        layer = nn.Linear(*self.weight.T.shape, bias=self.bias is not None, device="meta")
        return fill(layer, self.weight, self.bias)

    def pointwise(self) -> nn.Conv2d:
        """As a 1x1 convolution of images (B, in, H, W)."""
        return convolution(self.weight[..., None, None], self.bias)

    def over_rows(self) -> nn.Conv1d:
        """As a map over the rows of (B, in, C), which needs no transposition."""
        out, inputs = self.weight.shape
        layer = nn.Conv1d(inputs, out, 1, bias=self.bias is not None, device="meta")
        return fill(layer, self.weight[..., None], self.bias)


def linear_pair(layer: Linear) -> tuple[Weights, Weights]:
    """The maps of s and a of an equivariant linear layer."""
    sym, asym = (Weights.of(block) for block in layer.blocks())
    return sym, asym


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
        inputs * groups,
        out,
        tuple(size),
        stride,
        padding,
        groups=groups,
        bias=bias is not None,
        device="meta",
    )
    return fill(layer, kernel, bias)


def fill(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Give a layer made on the meta device its parameters, which are not trained."""
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return layer
