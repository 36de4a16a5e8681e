"""Where fused paths of `deit.kernels` replace the plain formulas of layers.

Each function computes what a layer does, or returns None where it cannot: another group, kind of
tensor, device or dtype, or dropout at work. The layer's own formula then runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from deit.groups import FLOP, Rep
from deit.kernels import cpu
from deit.layers.activation import GELU, quick_gelu

if TYPE_CHECKING:
    from deit.layers.attention import Attention
    from deit.layers.linear import Linear

__all__ = ["attention", "mix_tokens", "perceptron"]

ACTS: dict[Callable[[Tensor], Tensor], str] = {F.gelu: "gelu", quick_gelu: "quick_gelu"}


def _weights(layer: Linear) -> tuple[list[Tensor], list[Tensor]]:
    """The irreps' weights as matrices, and the shifts that there are."""
    blocks = layer.blocks()
    biases = [block.bias for block in blocks if block.bias is not None]
    return [block.weight.flatten(1) for block in blocks], biases


def _is_at_work(drop: Callable[[Tensor], Tensor] | None) -> bool:
    if drop is None or isinstance(drop, nn.Identity):
        return False
    return not isinstance(drop, nn.Dropout) or (drop.training and drop.p > 0)


def _is_halved(rep: Rep) -> bool:
    """Whether both irreps have half of the axis."""
    return rep.group is FLOP and rep.is_uniform


def perceptron(
    x: Tensor, fc1: Linear, act: GELU, fc2: Linear, drop: Callable[[Tensor], Tensor] | None
) -> Tensor | None:
    """fc2(act(fc1 x)) for x (..., C), with decomposed tokens (B, N, C)."""
    name = ACTS.get(act.act)
    if name is None or not _is_halved(fc1.in_rep) or _is_at_work(drop):
        return None
    across = act.across
    if across is not None and not _is_halved(across):
        return None
    (first, bias1), (second, bias2) = _weights(fc1), _weights(fc2)
    if not cpu.applies(x, *first, *bias1, *second, *bias2):
        return None
    tokens = 0 if across is None else across.invariant
    rows = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
    return cpu.perceptron(rows, first, bias1, second, bias2, name, tokens).reshape(x.shape)


def attention(x: Tensor, layer: Attention) -> Tensor | None:
    """The whole of an Attention for x (B, N, C)."""
    if not layer.fused_attn or not _is_halved(layer.rep):
        return None
    if _is_at_work(layer.attn_drop) or _is_at_work(layer.proj_drop):
        return None
    (qkv, bias1), (proj, bias2) = _weights(layer.qkv), _weights(layer.proj)
    if not cpu.applies(x, *qkv, *bias1, *proj, *bias2):
        return None
    return cpu.attention(x, qkv, bias1, proj, bias2, layer.num_heads)


def mix_tokens(x: Tensor, layer: Linear) -> Tensor | None:
    """A Linear over the tokens of x (B, N, C), packed in both axes."""
    if not _is_halved(layer.in_rep) or layer.across is None or not _is_halved(layer.across):
        return None
    weights, biases = _weights(layer)
    if layer.out_rep is not layer.in_rep or not cpu.applies(x, *weights, *biases):
        return None
    return cpu.mix_tokens(x, weights, biases)
