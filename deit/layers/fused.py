"""Where fused paths of `deit.kernels` replace the plain formulas of layers.

Each function computes what a layer does, or returns None where no fused path applies: another
group, kind of tensor, device or dtype, or dropout at work. The layer's own formula then runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.groups import FLOP, Rep
from deit.kernels import cpu, cpu_perceptron, gpu

if TYPE_CHECKING:
    from deit.layers.activation import GELU
    from deit.layers.attention import Attention
    from deit.layers.conv import MirrorDepthwiseConv2d
    from deit.layers.linear import Linear
    from deit.layers.norm import LayerNorm

__all__ = ["attention", "depthwise", "layer_norm", "linear", "mix_tokens", "perceptron"]


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


def linear(x: Tensor, layer: Linear) -> Tensor | None:
    """A Linear on x (..., C)."""
    if not (_is_halved(layer.in_rep) and _is_halved(layer.out_rep)):
        return None
    weights, biases = _weights(layer)
    if not gpu.applies(x, *weights, *biases):
        return None
    if layer.across is None:
        return gpu.linear(x, *weights, *biases)
    y, shift = gpu.linear(x, *weights), layer.shift()
    return y if shift is None else y + shift.to(y.dtype)


def perceptron(
    x: Tensor, fc1: Linear, act: GELU, fc2: Linear, drop: Callable[[Tensor], Tensor] | None
) -> Tensor | None:
    """fc2(act(fc1 x)) for x (..., C), with decomposed tokens (B, N, C)."""
    name = act.kernel
    if name is None or not _is_halved(fc1.in_rep) or _is_at_work(drop):
        return None
    across = act.across
    if across is not None and not _is_halved(across):
        return None
    (first, bias1), (second, bias2) = _weights(fc1), _weights(fc2)
    if gpu.applies(x, *first, *bias1, *second, *bias2):
        if across is not None:
            return fc2(act(fc1(x)))
        return gpu.perceptron(x, first, bias1, second, bias2, name)
    if not cpu.applies(x, *first, *bias1, *second, *bias2, training=True):
        return None
    tokens = 0 if across is None else across.invariant
    rows = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
    y = cpu_perceptron.perceptron(rows, first, bias1, second, bias2, name, tokens)
    return y.view(x.shape)


def attention(x: Tensor, layer: Attention) -> Tensor | None:
    """The whole of an Attention for x (B, N, C)."""
    if not layer.fused_attn or not _is_halved(layer.rep) or _is_at_work(layer.proj_drop):
        return None
    (qkv, bias1), (proj, bias2) = _weights(layer.qkv), _weights(layer.proj)
    dropout = layer.attn_drop.p if _is_at_work(layer.attn_drop) else 0.0
    if gpu.applies(x, *qkv, *bias1, *proj, *bias2):
        # products that write, and read, the halves of each head side by side
        half = layer.head_rep.invariant
        packed = gpu.linear(x, *qkv, *bias1, out_segment=half)
        # unbound where they lie: their gradients are then put side by side by one copy
        heads = packed.unflatten(-1, (3, layer.num_heads, 2 * half)).unbind(2)
        q, k, v = (head.transpose(1, 2) for head in heads)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return gpu.linear(y.transpose(1, 2).flatten(2), *proj, *bias2, in_segment=half)
    if dropout or not cpu.applies(x, *qkv, *bias1, *proj, *bias2):
        return None
    return cpu.attention(x, qkv, bias1, proj, bias2, layer.num_heads)


def mix_tokens(x: Tensor, layer: Linear) -> Tensor | None:
    """A Linear over the tokens of x (B, N, C), packed in both axes."""
    if not _is_halved(layer.in_rep) or layer.across is None or not _is_halved(layer.across):
        return None
    weights, biases = _weights(layer)
    if gpu.applies(x, *weights, *biases):
        # batches of products that read the tokens as rows, in place of a transposed copy
        parts = zip(weights, x.chunk(2, 1), strict=True)
        y = torch.cat([torch.bmm(w.expand(x.shape[0], -1, -1), part) for w, part in parts], 1)
        shift = layer.shift()
        return y if shift is None else y + shift.mT.to(y.dtype)
    if layer.out_rep is not layer.in_rep or not cpu.applies(x, *weights, *biases):
        return None
    return cpu.mix_tokens(x, weights, biases)


def layer_norm(x: Tensor, layer: LayerNorm) -> Tensor | None:
    """A LayerNorm of x (..., C). `torch.compile` fuses the plain formula by itself."""
    if torch.compiler.is_compiling() or not _is_halved(layer.rep):
        return None
    if not gpu.applies(x):
        return None
    return gpu.mirror_layer_norm(x, layer.scaling.scale(), layer.scaling.offset(), layer.eps)


def depthwise(x: Tensor, layer: MirrorDepthwiseConv2d) -> Tensor | None:
    """A MirrorDepthwiseConv2d on x (B, C, H, W)."""
    if not gpu.applies(x):
        return None
    y = gpu.depthwise(x.permute(0, 2, 3, 1), layer.left_half(), layer.bias())
    return y.permute(0, 3, 1, 2)
