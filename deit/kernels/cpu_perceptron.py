r"""The perceptron of packed features on CPUs, forward and backward, in pieces (see `cpu`).

The Hadamard matrix H of the butterflies, without its factors, is symmetric. With
u = H (W_1 x + b_1) the perceptron is W_2 H f(u) + b_2, and with g the gradient of its result that
of u is f'(u) H W_2^T g. Backward computes u anew from x, which is all that training keeps: a sixth
more multiply-adds in place of two hidden features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from deit.kernels.cpu import LEAST_ROWS, pieces, product

__all__ = ["perceptron"]


class Function(NamedTuple):
    """A pointwise function, and the factor on its argument that it leaves to others."""

    overwrite: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]  # of the result's gradient and the argument
    scale: float


_ACTS = {
    "gelu": Function(torch.ops.aten.gelu_, torch.ops.aten.gelu_backward, 1.0),
    # x sigmoid(c x) = silu(c x) / c
    "quick_gelu": Function(torch.ops.aten.silu_, torch.ops.aten.silu_backward, 1.702),
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
    args = (x, first, first_bias, second, second_bias, act, tokens)
    inputs = (x, *first, *first_bias, *second, *second_bias)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return _operator(*args) if differentiated or torch.compiler.is_compiling() else _forward(*args)


def _forward(
    x: Tensor,
    first: Sequence[Tensor],
    first_bias: Sequence[Tensor],
    second: Sequence[Tensor],
    second_bias: Sequence[Tensor],
    act: str,
    tokens: int,
) -> Tensor:
    function, _, scale = _ACTS[act]
    gain = _gain(tokens)
    before, after = gain * scale, gain / scale
    out = x.new_empty(x.shape)
    for piece, half in _cut(x, first[0], tokens, out):
        parts = _map((piece * before).chunk(2, -1), first, first_bias, before, tokens)
        copies = [function(u) for u in _to_regular(*parts, tokens)]
        parts = _map(_to_packed(copies, tokens), second, second_bias, 1 / after, tokens)
        for part, result in zip(parts, half.chunk(2, -1), strict=True):
            torch.mul(part, after, out=result)
    return out


def _gain(tokens: int) -> float:
    """The factor of the butterflies on either side of the function."""
    return 0.5 if tokens else sqrt(0.5)


def _cut(x: Tensor, weight: Tensor, tokens: int, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Matching pieces of tensors (B, N, C), of whole images if the tokens are decomposed."""
    width = weight.shape[0]
    if tokens:
        # half as much: the butterflies over tokens have twice as many results alive
        where = pieces(x.shape[0], 2 * x.shape[1] * width)
        return [tuple(t[piece] for t in (x, *others)) for piece in where]
    rows = [t.reshape(1, -1, t.shape[-1]) for t in (x, *others)]
    return [
        tuple(t[:, piece] for t in rows) for piece in pieces(rows[0].shape[1], width, LEAST_ROWS)
    ]


def _map(
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
        y = product(part.flatten(0, 1), weight, None if tokens else bias)
        y = y.unflatten(0, part.shape[:2])
        if tokens and bias is not None:
            _own_rows(y, i, tokens).add_(bias)
        outputs.append(y)
    return outputs


def _own_rows(part: Tensor, irrep: int, tokens: int) -> Tensor:
    """The tokens of a part on which there is a shift: those of the same irrep; all if whole."""
    if not tokens:
        return part
    return part[:, tokens:] if irrep else part[:, :tokens]


def _butterfly_(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(x + y, x - y), the sum in the memory of x."""
    difference = x - y
    return x.add_(y), difference


def _to_regular(s: Tensor, a: Tensor, tokens: int) -> list[Tensor]:
    """H of both irreps: two copies (images, N, H/2), or four of half the tokens; overwrites."""
    copies = _butterfly_(s, a)
    if not tokens:
        return list(copies)
    return [y for x in copies for y in _butterfly_(x[:, :tokens], x[:, tokens:])]


def _to_packed(copies: Sequence[Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """H of the copies, as the two irreps (images, N, H/2); overwrites."""
    if tokens:
        halves = zip(copies[::2], copies[1::2], strict=True)
        copies = [torch.cat([left + right, left - right], 1) for left, right in halves]
    return _butterfly_(*copies)


def _backward(
    grad: Tensor,
    x: Tensor,
    first: Sequence[Tensor],
    first_bias: Sequence[Tensor],
    second: Sequence[Tensor],
    second_bias: Sequence[Tensor],
    act: str,
    tokens: int,
) -> list[Tensor]:
    """The gradients of all tensors, in the order of the arguments."""
    function, derivative, scale = _ACTS[act]
    gain = _gain(tokens)
    before, after = gain * scale, gain / scale
    dx = x.new_empty(x.shape)
    sums = [[t.new_zeros(t.shape) for t in ts] for ts in (first, first_bias, second, second_bias)]
    d_first, d_first_bias, d_second, d_second_bias = sums
    transposed = [w.t() for w in first], [w.t() for w in second]
    for piece, g, d_piece in _cut(x, first[0], tokens, grad, dx):
        inputs = (piece * before).chunk(2, -1)
        _add_shifts(d_second_bias, g.chunk(2, -1), 1.0, tokens)
        g = (g * after).chunk(2, -1)
        arguments = _to_regular(*_map(inputs, first, first_bias, before, tokens), tokens)
        hidden = _to_packed([function(u.clone()) for u in arguments], tokens)
        _add_products(d_second, g, hidden)
        copies = _to_regular(*_map(g, transposed[1], (), 1.0, tokens), tokens)
        copies = [derivative(d, u) for d, u in zip(copies, arguments, strict=True)]
        d_hidden = _to_packed(copies, tokens)
        _add_products(d_first, d_hidden, inputs)
        _add_shifts(d_first_bias, d_hidden, before, tokens)
        parts = _map(d_hidden, transposed[0], (), 1.0, tokens)
        for part, half in zip(parts, d_piece.chunk(2, -1), strict=True):
            torch.mul(part, before, out=half)
    return [dx, *d_first, *d_first_bias, *d_second, *d_second_bias]


def _add_products(totals: Sequence[Tensor], grads: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
    """Add this piece's gradients of both weights."""
    for total, grad, x in zip(totals, grads, xs, strict=True):
        total.addmm_(grad.flatten(0, 1).t(), x.flatten(0, 1))


def _add_shifts(
    totals: Sequence[Tensor], grads: Sequence[Tensor], factor: float, tokens: int
) -> None:
    """Add this piece's gradients of the shifts that there are."""
    for i, total in enumerate(totals):
        total.add_(_own_rows(grads[i], i, tokens).sum((0, 1)), alpha=factor)


_TENSORS = "Tensor x, Tensor[] first, Tensor[] first_bias, Tensor[] second, Tensor[] second_bias"
_operator = torch.library.custom_op(
    "deit::cpu_perceptron",
    _forward,
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TENSORS}, str act, int tokens) -> Tensor",
)
_backward_operator = torch.library.custom_op(
    "deit::cpu_perceptron_backward",
    _backward,
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad, {_TENSORS}, str act, int tokens) -> Tensor[]",
)


@_operator.register_fake
def _(x: Tensor, *args) -> Tensor:
    return x.new_empty(x.shape)


@_backward_operator.register_fake
def _(grad: Tensor, x: Tensor, *args) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (x, *(t for tensors in args[:4] for t in tensors))]


def _setup(ctx, inputs, output) -> None:
    x, *groups, ctx.act, ctx.tokens = inputs
    ctx.lengths = [len(tensors) for tensors in groups]
    ctx.save_for_backward(x, *(t for tensors in groups for t in tensors))


def _grouped(tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    tensors = list(tensors)
    return [[tensors.pop(0) for _ in range(length)] for length in lengths]


def _differentiate(ctx, grad: Tensor) -> tuple:
    x, *tensors = ctx.saved_tensors
    groups = _grouped(tensors, ctx.lengths)
    dx, *gradients = _backward_operator(grad, x, *groups, ctx.act, ctx.tokens)
    return dx, *_grouped(gradients, ctx.lengths), None, None


_operator.register_autograd(_differentiate, setup_context=_setup)
