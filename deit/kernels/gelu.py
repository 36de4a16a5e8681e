r"""The nonlinearity of a mirror pair, act in the regular basis, in one pass over memory.

r+- = (s +- a)/sqrt 2, g+- = act(r+-), s' = (g+ + g-)/sqrt 2, a' = (g+ - g-)/sqrt 2
(arXiv:2502.05169, section 3). Backward recomputes everything from the input, the only thing saved.
Twin of `deit.layers.activation.GELU` for the flopping group.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels import tuning
from deit.kernels.backends import compiles_directly, gelu_triton, triton_runs
from deit.kernels.tuning import Candidate

__all__ = ["ACTIVATIONS", "mirror_gelu", "plain_gelu"]

ACTIVATIONS = ("gelu", "quick_gelu")
CHUNK = 1 << 24  # elements that the plain implementation transforms at a time
_OPTIONS = dict(mutates_args=())


def check_activation(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, not {act!r}")


def mirror_gelu(x: Tensor, act: str = "gelu") -> Tensor:
    """`act` of a packed feature, in the regular basis of its last axis.

    Args:
        x: (..., 2K), symmetric channels first, of a floating dtype; half precision is computed
            in float32 inside.
        act: "gelu" (exact, with erf) or "quick_gelu", x sigmoid(1.702 x).

    Returns:
        A new contiguous tensor of the shape and dtype of `x`.

    Raises:
        ValueError: if the last axis is odd, the dtype is no floating one or `act` is unknown.
    """
    check_activation(act)
    if x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be floating, with an even last axis, not {tuple(x.shape)} of {x.dtype}"
        )
    ops = torch.ops.deit
    return (ops.direct_gelu if compiles_directly(x) else ops.mirror_gelu)(x, act)


def as_rows(x: Tensor) -> Tensor:
    """(..., C) -> (rows, C), rows with a stride, the last axis contiguous; a view if possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _work(*tensors: Tensor) -> tuple[Tensor, ...]:
    half = tensors[0].dtype in (torch.float16, torch.bfloat16)
    return tuple(t.float() if half else t for t in tensors)


def _butterfly(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    return (s + a) * sqrt(0.5), (s - a) * sqrt(0.5)


def plain_gelu(x: Tensor, act: str) -> Tensor:
    """`mirror_gelu` in torch operations."""
    plus, minus = _butterfly(*_work(*x.chunk(2, -1)))
    if act == "gelu":
        plus, minus = F.gelu(plus), F.gelu(minus)
    else:
        plus, minus = (r * torch.sigmoid(1.702 * r) for r in (plus, minus))
    return torch.cat(_butterfly(plus, minus), -1).to(x.dtype)


def _slope(r: Tensor, act: str) -> Tensor:
    if act == "gelu":
        return (
            0.5 * (1 + torch.erf(r * sqrt(0.5))) + r * torch.exp(-0.5 * r * r) * 0.3989422804014327
        )
    sigmoid = torch.sigmoid(1.702 * r)
    return sigmoid * (1 + 1.702 * r * (1 - sigmoid))


def plain_gelu_backward(grad: Tensor, x: Tensor, act: str) -> Tensor:
    """The gradient with respect to `x` in torch operations, which can be differentiated again."""
    plus, minus = _butterfly(*_work(*x.chunk(2, -1)))
    d_plus, d_minus = _butterfly(*_work(*grad.chunk(2, -1)))
    d_plus, d_minus = d_plus * _slope(plus, act), d_minus * _slope(minus, act)
    return torch.cat(_butterfly(d_plus, d_minus), -1).to(x.dtype)


def _in_chunks(function: Callable[..., Tensor], *tensors: Tensor, act: str) -> Tensor:
    """`function` on (rows, 2K), a limited number of rows at a time: its temporary results, many
    and in float32, would otherwise be the largest of a whole training step."""
    rows = max(1, CHUNK // tensors[0].shape[1])
    chunks = zip(*(t.split(rows) for t in tensors), strict=True)
    results = [function(*chunk, act) for chunk in chunks]
    return results[0] if len(results) == 1 else torch.cat(results)


def gelu_rows(x: Tensor, act: str) -> Tensor:
    """`plain_gelu` of (rows, 2K) in bounded memory."""
    return _in_chunks(plain_gelu, x, act=act)


def _gelu_backward_rows(grad: Tensor, x: Tensor, act: str) -> Tensor:
    return _in_chunks(plain_gelu_backward, grad, x, act=act)


_PLAIN = Candidate("plain", gelu_rows)
_PLAIN_BACKWARD = Candidate("plain", _gelu_backward_rows)


def _key(x: Tensor, act: str) -> tuple:
    return (x.shape[-1], tuning.bucket(x.numel() // x.shape[-1]), act)


@torch.library.custom_op("deit::mirror_gelu", **_OPTIONS)
def _gelu_op(x: Tensor, act: str) -> Tensor:
    def candidates() -> list[Candidate]:
        return [*(gelu_triton().FORWARD if triton_runs(x) else ()), _PLAIN]

    return tuning.run("mirror_gelu", _key(x, act), _PLAIN, candidates, as_rows(x), act).view(
        x.shape
    )


@_gelu_op.register_fake
def _(x: Tensor, act: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("deit::mirror_gelu_backward", **_OPTIONS)
def _gelu_backward_op(grad: Tensor, x: Tensor, act: str) -> Tensor:
    def candidates() -> list[Candidate]:
        return [*(gelu_triton().BACKWARD if triton_runs(x) else ()), _PLAIN_BACKWARD]

    args = (as_rows(grad), as_rows(x), act)
    key = _key(x, act)
    return tuning.run("mirror_gelu_backward", key, _PLAIN_BACKWARD, candidates, *args).view(x.shape)


@_gelu_backward_op.register_fake
def _(grad: Tensor, x: Tensor, act: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.act = inputs[-1]
    ctx.save_for_backward(*inputs[:-1])


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return _gelu_backward_op(grad, x, ctx.act), None


def _double_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """Gradients of second order are rare: torch derives them from the plain formula."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        result = plain_gelu_backward(*inputs, ctx.act)
    return (*torch.autograd.grad(result, inputs, grad), None)


_gelu_op.register_autograd(_backward, setup_context=_setup)
_gelu_backward_op.register_autograd(_double_backward, setup_context=_setup)
