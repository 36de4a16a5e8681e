"""Inference on CPUs in float32: products by oneDNN, in pieces that stay in the cache.

Half-width layers are fast enough for memory to matter: a hidden feature of a whole batch leaves the
cache, and the allocator gives such buffers back to the system each time, which then clears every
page anew. So rows go through a perceptron, and images through an attention, a few at a time. The
constant factors of the butterflies are applied where features are copied anyway.

oneDNN takes rows with a stride, as the halves of packed features are, and uses the widest vectors
of the processor, whoever made it.

`torch.compile` sees operators (`deit::cpu_…`), which it leaves whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from math import ceil, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels.choice import is_plain_tensor

__all__ = ["applies", "attention", "mix_tokens", "perceptron", "product"]

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# bytes of one irrep's widest feature in a piece: several of them lie in the cache together
PIECE = 2**20
# rows below which a product no longer runs at full speed
LEAST_ROWS = 128


def applies(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the functions of this module can replace the plain formulas."""
    if not is_plain_tensor(x) or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    if not AVAILABLE or torch.is_autocast_enabled("cpu") or not x.numel():
        return False
    if not torch.compiler.is_compiling() and not torch.backends.mkldnn.enabled:
        return False
    present = [w for w in weights if w is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *present)):
        return False
    # a parameter may have been replaced by a tensor of another kind, a quantised one for example
    return all(is_plain_tensor(w) and w.dtype == torch.float32 for w in present)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN for rows of any stride: (n, k), (m, k), (m,) -> (n, m)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _pieces(rows: int, width: int, least: int = 1) -> list[slice]:
    """Cut `rows` of `width` float32 into pieces of about `PIECE` bytes and of `least` rows or more,
    all of about the same length."""
    count = max(1, min(rows // least, ceil(rows * width * 4 / PIECE)))
    bounds = [rows * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _butterfly_(x: Tensor, y: Tensor, difference: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x + y, x - y); the sum overwrites x, the difference what it is given."""
    difference = torch.sub(x, y, out=difference)
    return x.add_(y), difference


def _activate_(s: Tensor, a: Tensor, act: Callable[[Tensor], object], tokens: int) -> None:
    """The nonlinearity without the factors of its butterflies, in place.

    s, a: (images, N, H/2); the first `tokens` of N are the symmetric ones, 0 if the tokens are in
    their own places.
    """
    plus, minus = _butterfly_(s, a)
    for x in (plus, minus):
        if tokens:
            left, right = _butterfly_(x[:, :tokens], x[:, tokens:])
            act(left)
            act(right)
            _butterfly_(left, right, difference=x[:, tokens:])
        else:
            act(x)
    _butterfly_(plus, minus, difference=a)


# by name: the function in place, and the factor on its argument that it leaves to others:
# x sigmoid(c x) = silu(c x) / c, one pass in place of three
_ACTS: dict[str, tuple[Callable[[Tensor], object], float]] = {
    "gelu": (torch.ops.aten.gelu_, 1.0),
    "quick_gelu": (torch.ops.aten.silu_, 1.702),
}


def perceptron(
    x: Tensor,
    first: Sequence[Tensor],
    first_bias: Sequence[Tensor],
    second: Sequence[Tensor],
    second_bias: Sequence[Tensor],
    act: str,
    tokens: int = 0,
) -> Tensor:
    """Two linear maps and the nonlinearity of packed features between them.

    Args:
        x: (B, N, C), packed channels.
        first, second: the weights of both irreps, (H/2, C/2) and (C/2, H/2).
        first_bias, second_bias: the shift of the symmetric part; of both if `tokens`; or none.
        act: `gelu` or `quick_gelu`.
        tokens: number of symmetric tokens, the first half of N, if tokens are decomposed too.

    Returns:
        (B, N, C), contiguous.
    """
    images, length, width = x.shape
    function, scale = _ACTS[act]
    gain = 0.5 if tokens else sqrt(0.5)
    before, after = gain * scale, gain / scale
    if not tokens:  # rows are all alike, so that pieces need not end with an image
        x = x.reshape(1, -1, width)
    per_piece, least = (length, 1) if tokens else (1, LEAST_ROWS)
    units = images if tokens else images * length
    out = x.new_empty(x.shape)
    for piece in _pieces(units, per_piece * first[0].shape[0], least):
        where = (piece, slice(None)) if tokens else (slice(None), piece)
        parts = _map(x[where] * before, first, first_bias, before, tokens)
        _activate_(*parts, function, tokens)
        parts = _map_parts(parts, second, second_bias, 1 / after, tokens)
        for part, half in zip(parts, out[where].chunk(2, -1), strict=True):
            torch.mul(part, after, out=half)
    return out.view(images, length, width)


def _map(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], factor: float, tokens: int
) -> list[Tensor]:
    return _map_parts(x.chunk(2, -1), weights, biases, factor, tokens)


def _map_parts(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    factor: float,
    tokens: int,
) -> list[Tensor]:
    """A linear map of both irreps, (images, N, k) each, with `factor` on its shift."""
    outputs = []
    for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        # without decomposed tokens the one shift, of the symmetric part, is on all rows
        bias = biases[i] * factor if i < len(biases) else None
        whole = None if tokens else bias
        y = product(part.flatten(0, 1), weight, whole).unflatten(0, part.shape[:2])
        if tokens and bias is not None:
            (y[:, tokens:] if i else y[:, :tokens]).add_(bias)
        outputs.append(y)
    return outputs


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
    for piece in _pieces(images, length * 3 * (width // 2)):
        part = x[piece]
        count = part.shape[0]
        # the irreps of q, k and v next to each other: (images, N, 3, heads, 2, width of a half)
        packed = x.new_empty(count, length, 3, heads, 2, width // (2 * heads))
        for i, y in enumerate(_map(part, qkv, qkv_bias, 1.0, 0)):
            packed[..., i, :] = y.unflatten(-1, (3, heads, -1))
        q, k, v = packed.flatten(-2).permute(2, 0, 3, 1, 4)  # (images, heads, N, C/heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(-1, (2, -1))
        parts = [y[..., i, :].flatten(2) for i in range(2)]
        for result, half in zip(
            _map_parts(parts, proj, proj_bias, 1.0, 0), out[piece].chunk(2, -1), strict=True
        ):
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


_TWO_MAPS = "Tensor[] {0}, Tensor[] {0}_bias, Tensor[] {1}, Tensor[] {1}_bias"
perceptron = _operator(perceptron, _TWO_MAPS.format("first", "second") + ", str act, int tokens=0")
attention = _operator(attention, _TWO_MAPS.format("qkv", "proj") + ", int heads")
mix_tokens = _operator(mix_tokens, "Tensor[] weights, Tensor[] biases")
