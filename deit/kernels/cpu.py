"""Paths for CPUs in float32: products by oneDNN, in pieces that stay in the cache.

Half-width layers are fast enough for memory to matter: a hidden feature of a whole batch leaves the
cache, and the allocator gives such buffers back to the system each time, which then clears every
page anew. So rows go through a perceptron, and images through an attention, a few at a time. The
constant factors of the butterflies are applied where features are copied anyway.

oneDNN takes rows with a stride, as the halves of packed features are, and uses the widest vectors
of the processor, whoever made it.

`torch.compile` sees operators (`deit::cpu_…`), which it leaves whole.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels.choice import is_plain_tensor

__all__ = ["AVAILABLE", "applies", "apply_pair", "attention", "mix_tokens", "pieces", "product"]

# on other architectures oneDNN's products are other libraries', and untried here
AVAILABLE = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
# Bytes of one irrep's widest feature in a piece. A few of these are alive at a time: small enough
# for the last cache and for the allocator to keep, large enough that the threads seldom have to
# wait for each other, which costs much where other programs use the same cores.
PIECE = 2**23
# rows below which a product no longer runs at full speed
LEAST_ROWS = 128


def applies(x: Tensor, *weights: Tensor | None, training: bool = False) -> bool:
    """Whether the functions of this module can replace the plain formulas.

    Args:
        training: whether the function in question has gradients.
    """
    if not is_plain_tensor(x) or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    if not AVAILABLE or torch.is_autocast_enabled("cpu") or x.numel() == 0:
        return False
    if not torch.compiler.is_compiling() and not torch.backends.mkldnn.enabled:
        return False
    present = [w for w in weights if w is not None]
    if not training and torch.is_grad_enabled() and any(t.requires_grad for t in (x, *present)):
        return False
    # a parameter may have been replaced by a tensor of another kind, a quantised one for example
    return all(is_plain_tensor(w) and w.dtype == torch.float32 for w in present)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN for rows of any stride: (n, k), (m, k), (m,) -> (n, m)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def pieces(rows: int, width: int, least: int = 1) -> list[slice]:
    """Cut `rows` of `width` float32 into pieces of about `PIECE` bytes and of `least` rows or more,
    all of about the same length."""
    count = max(1, min(rows // least, ceil(rows * width * 4 / PIECE)))
    bounds = [rows * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def apply_pair(
    parts: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> list[Tensor]:
    """The linear maps of both irreps, (images, N, k) each; a bias is of the symmetric part."""
    shifts = [biases[0] if biases else None, None]
    return [
        product(part.flatten(0, 1), weight, shift).unflatten(0, part.shape[:2])
        for part, weight, shift in zip(parts, weights, shifts, strict=True)
    ]


def attention(
    x: Tensor,
    qkv: Sequence[Tensor],
    qkv_bias: Sequence[Tensor],
    proj: Sequence[Tensor],
    proj_bias: Sequence[Tensor],
    heads: int,
) -> Tensor:
    """Self-attention of packed features, whose heads hold both irreps side by side.

    Args:
        x: (B, N, C), packed.
        qkv, proj: the weights of both irreps, (3C/2, C/2) and (C/2, C/2).
        qkv_bias, proj_bias: the shift of the symmetric part, or none.

    Returns:
        (B, N, C), contiguous.
    """
    images, length, width = x.shape
    out = x.new_empty(x.shape)
    for piece in pieces(images, length * 3 * (width // 2)):
        part = x[piece]
        count = part.shape[0]
        # the irreps of q, k and v next to each other: (images, N, 3, heads, 2, width of a half)
        packed = x.new_empty(count, length, 3, heads, 2, width // (2 * heads))
        for i, y in enumerate(apply_pair(part.chunk(2, -1), qkv, qkv_bias)):
            packed[..., i, :] = y.unflatten(-1, (3, heads, -1))
        q, k, v = packed.flatten(-2).permute(2, 0, 3, 1, 4)  # (images, heads, N, C/heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(-1, (2, -1))
        results = apply_pair([y[..., i, :].flatten(2) for i in range(2)], proj, proj_bias)
        for result, half in zip(results, out[piece].chunk(2, -1), strict=True):
            half.copy_(result)
    return out


def mix_tokens(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """A linear map over tokens that are decomposed, for packed channels.

    Args:
        x: (B, N, C), packed in both axes; the last one contiguous.
        weights: of both irreps of tokens, (N/2, N/2).
        biases: of both, (N/2,), each on the channels of its own irrep; or none.

    Returns:
        (B, N, C), contiguous.
    """
    out = x.new_empty(x.shape)
    for image, result in zip(x, out, strict=True):
        for i, (rows, weight) in enumerate(zip(image.chunk(2), weights, strict=True)):
            # y = W x: oneDNN reads the transpose of x as it is
            y = result.chunk(2)[i].copy_(product(weight, rows.mT))
            if biases:
                y.chunk(2, -1)[i].add_(biases[i][:, None])
    return out


def _operator(function: Callable[..., Tensor], schema: str) -> Callable[..., Tensor]:
    """`function`, as an operator while `torch.compile` looks and as itself otherwise.

    Its result has the shape and dtype of its first argument, and is contiguous.
    """
    operator = torch.library.custom_op(
        f"deit::cpu_{function.__name__}",
        function,
        mutates_args=(),
        device_types="cpu",
        schema=f"(Tensor x, {schema}) -> Tensor",
    )
    operator.register_fake(lambda x, *args: x.new_empty(x.shape))

    @wraps(function)
    def choose(*args: Any) -> Tensor:
        return operator(*args) if torch.compiler.is_compiling() else function(*args)

    return choose


attention = _operator(
    attention, "Tensor[] qkv, Tensor[] qkv_bias, Tensor[] proj, Tensor[] proj_bias, int heads"
)
mix_tokens = _operator(mix_tokens, "Tensor[] weights, Tensor[] biases")
