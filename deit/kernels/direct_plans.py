"""Which implementation the code that is being compiled calls: the plans of direct.py.

A plan is the name of a candidate of `deit.kernels.tuning`. It is chosen on random tensors of the
sizes at hand, of the first size that was seen where a compiler keeps the number of rows open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from deit.kernels import gelu_triton, linear, linear_launch, tuning
from deit.kernels.gelu import _PLAIN as PLAIN_GELU
from deit.kernels.gelu import _PLAIN_BACKWARD as PLAIN_GELU_BACKWARD
from deit.kernels.linear_launch import size_hint
from deit.kernels.tuning import Candidate

__all__ = [
    "act_plan",
    "gelu_backward_plan",
    "gelu_plan",
    "halves",
    "library_linear",
    "library_weight_grad",
    "linear_plan",
    "weight_grad_plan",
    "whole",
]

TIMED_ROWS = 1 << 15  # more rows than these take time in proportion, and memory


# --- products by the libraries, written so that compilers see them ----------------------------


def halves(x: Tensor, segment: int) -> Tensor:
    """(rows, 2K) -> (2, rows, K), a view if `x` is packed."""
    return x.unflatten(1, (-1, 2, segment)).permute(2, 0, 1, 3).flatten(2)


def whole(pair: Tensor, segment: int) -> Tensor:
    """The inverse of `halves`; a compiler writes it together with what follows."""
    return pair.unflatten(2, (-1, segment)).permute(1, 2, 0, 3).flatten(1)


def library_linear(
    batched: bool,
    x: Tensor,
    ws: Tensor,
    wa: Tensor,
    bias: Tensor | None,
    in_segment: int,
    out_segment: int,
) -> Tensor:
    """`mirror_linear` on rows, by one product of batches or by two products."""
    pair = halves(x, in_segment)
    bias = None if bias is None else bias.to(x.dtype)
    if batched:
        y = torch.bmm(pair, torch.stack([ws, wa]).transpose(1, 2))
        if bias is not None:
            y = y + torch.stack([bias, torch.zeros_like(bias)])[:, None]
    else:
        s = pair[0] @ ws.t() if bias is None else torch.addmm(bias, pair[0], ws.t())
        y = torch.stack([s, pair[1] @ wa.t()])
    return whole(y, out_segment)


def library_weight_grad(
    batched: bool, grad: Tensor, x: Tensor, in_segment: int, out_segment: int
) -> Tensor:
    """Both weights' gradients, (2, N, K), likewise."""
    grads, parts = halves(grad, out_segment).transpose(1, 2), halves(x, in_segment)
    if batched:
        return torch.bmm(grads, parts)
    return torch.stack([grads[0] @ parts[0], grads[1] @ parts[1]])


# --- decisions --------------------------------------------------------------------------------


class Random:
    """Makes random tensors like a given one, with a generator of their own."""

    def __init__(self, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self.rows = rows
        self._options = dict(device=device, dtype=dtype)
        self._generator = torch.Generator(device).manual_seed(0)

    def features(self, width: int) -> Tensor:
        """(rows, width)."""
        return self._normal(self.rows, width)

    def weight(self, n: int, k: int, rows_contiguous: bool) -> Tensor:
        """(N, K) of such a size that a product has entries of the size of its factor's."""
        w = self._normal(n, k) if rows_contiguous else self._normal(k, n).t()
        return w * k**-0.5

    def bias(self, n: int) -> Tensor:
        return self._normal(n)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, **self._options)


def _choose(
    op: str,
    x: Tensor,
    rest: tuple,
    plain: Candidate,
    candidates: Sequence[Candidate],
    inputs: Callable[[Random], tuple],
) -> str:
    """The name of the candidate for rows like `x`; `rest` is what else the choice depends on.

    Tried in a thread of its own, where nothing that a compiler does to tensors is in force.
    """
    rows, device, dtype = min(size_hint(x.shape[0]), TIMED_ROWS), x.device, x.dtype
    tf32 = dtype == torch.float32 and device.type == "cuda" and tuning.tf32_allowed()
    key = ("compiled", x.shape[1], tuning.bucket(rows), tf32, *rest)

    def run() -> str:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        make = lambda: inputs(Random(rows, device, dtype))  # noqa: E731
        with torch.no_grad():
            return tuning.choose(op, key, plain, lambda: candidates, device, dtype, make)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def linear_plan(
    x: Tensor, ws: Tensor, wa: Tensor, bias: Tensor | None, in_segment: int, out_segment: int
) -> str:
    """How to compute `mirror_linear` on rows: "plain", "batched" or a kernel's configuration."""
    (n, k), layout = ws.shape, (ws.stride(1) == 1, wa.stride(1) == 1)
    kernels = linear_launch.linear_candidates(x.dtype)
    if linear._packed(ws, in_segment, out_segment):
        # These write the packed result in place; compiled code does it in the operation after it.
        candidates = [linear._PLAIN, linear._BATCHED, *kernels]
    else:
        library = Candidate("batched", lambda *args: library_linear(True, *args))
        candidates = [*kernels, linear._PLAIN, library]

    def inputs(random: Random) -> tuple:
        weights = (random.weight(n, k, contiguous) for contiguous in layout)
        shift = None if bias is None else random.bias(n)
        return random.features(2 * k), *weights, shift, in_segment, out_segment

    rest = (n, in_segment, out_segment, bias is not None, layout)
    return _choose("mirror_linear", x, rest, linear._PLAIN, candidates, inputs)


def act_plan(
    x: Tensor,
    ws: Tensor,
    wa: Tensor,
    bias: Tensor | None,
    in_segment: int,
    act: str,
    save: bool,
) -> str:
    """How to compute `mirror_linear_act` on rows, likewise; or "plain_then_gelu" and so on."""
    (n, k), layout = ws.shape, (ws.stride(1) == 1, wa.stride(1) == 1)
    candidates = linear._act_candidates(x.dtype, linear._packed(ws, in_segment, n))

    def inputs(random: Random) -> tuple:
        weights = (random.weight(n, k, contiguous) for contiguous in layout)
        shift = None if bias is None else random.bias(n)
        return random.features(2 * k), *weights, shift, in_segment, act, save

    rest = (n, in_segment, act, save, bias is not None, layout)
    return _choose("mirror_linear_act", x, rest, linear._PLAIN_ACT, candidates, inputs)


def weight_grad_plan(grad: Tensor, x: Tensor, in_segment: int, out_segment: int) -> str:
    """How to compute the weights' gradients from rows: as for `linear_plan`."""
    dtype, width, n = x.dtype, x.shape[1], grad.shape[1] // 2

    def kernel(name: str) -> Candidate:
        config = linear_launch.config_of(name)
        parts = linear_launch.weight_grad_parts
        return Candidate(name, lambda *args: parts(*args, config).sum(0).to(dtype))

    plain, batched = (
        Candidate(name, lambda *args, batched=batched: library_weight_grad(batched, *args))
        for name, batched in (("plain", False), ("batched", True))
    )
    kernels = [kernel(c.name) for c in linear_launch.weight_grad_candidates(dtype)]
    packed = (2 * in_segment, 2 * out_segment) == (width, 2 * n)
    candidates = [plain, batched, *kernels] if packed else [*kernels, plain, batched]

    def inputs(random: Random) -> tuple:
        return random.features(2 * n), random.features(width), in_segment, out_segment

    rest = (n, in_segment, out_segment)
    return _choose("mirror_linear_weight_grad", x, rest, plain, candidates, inputs)


def gelu_plan(x: Tensor, act: str) -> str:
    """How to compute `mirror_gelu` on rows: "plain" or a kernel's tile."""
    candidates = [*gelu_triton.FORWARD, PLAIN_GELU]
    width = x.shape[1]
    return _choose(
        "mirror_gelu",
        x,
        (act,),
        PLAIN_GELU,
        candidates,
        lambda random: (random.features(width), act),
    )


def gelu_backward_plan(x: Tensor, act: str) -> str:
    """How to compute the gradient of `mirror_gelu` on rows, likewise."""
    candidates = [*gelu_triton.BACKWARD, PLAIN_GELU_BACKWARD]
    width = x.shape[1]
    return _choose(
        "mirror_gelu_backward",
        x,
        (act,),
        PLAIN_GELU_BACKWARD,
        candidates,
        lambda random: (random.features(width), random.features(width), act),
    )
