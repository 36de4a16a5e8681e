"""Fused paths on GPUs: operations that choose between Triton kernels and the libraries.

The layers call them through here, which adds what the layers' plain formulas get from PyTorch:
autocast, and the answer to whether a fused path applies at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deit.kernels.backends import kernels_take
from deit.kernels.choice import is_plain_tensor
from deit.kernels.depthwise import mirror_depthwise
from deit.kernels.layer_norm import mirror_layer_norm
from deit.kernels.linear import mirror_linear as linear
from deit.kernels.perceptron import mirror_perceptron
from deit.kernels.trial import trust_compiler

__all__ = [
    "applies",
    "depthwise",
    "linear",
    "mirror_layer_norm",
    "perceptron",
    "trust_compiler",
]


def applies(x: Tensor, *weights: Tensor) -> bool:
    """Whether the operations of this module can replace the plain formulas."""
    if not is_plain_tensor(x) or not _runs(x.device, x.dtype) or x.numel() == 0:
        return False
    autocast = torch.is_autocast_enabled(x.device.type)
    if any(w.device != x.device or (w.dtype != x.dtype and not autocast) for w in weights):
        return False  # the plain formula tells what is wrong
    return all(is_plain_tensor(w) for w in weights)


@torch.compiler.assume_constant_result
def _runs(device: torch.device, dtype: torch.dtype) -> bool:
    return kernels_take(device, dtype)


def depthwise(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """`mirror_depthwise` in the dtype that autocast asks of convolutions."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return mirror_depthwise(x, kernel, bias, dtype)


def perceptron(
    x: Tensor,
    first: Sequence[Tensor],
    first_bias: Sequence[Tensor],
    second: Sequence[Tensor],
    second_bias: Sequence[Tensor],
    act: str,
) -> Tensor:
    """`mirror_perceptron`, with a shift or none in each list."""
    bias1, bias2 = (biases[0] if biases else None for biases in (first_bias, second_bias))
    return mirror_perceptron(x, tuple(first), bias1, tuple(second), bias2, act)
