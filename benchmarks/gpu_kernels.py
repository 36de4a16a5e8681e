"""How fast the fused operations are by themselves, beside what the ordinary twin does instead.

Used by gpu_report.py. All candidates of an operation are timed on the GPU alone, without the time
that Python takes to launch them, at sizes of ViT S, B, L and H and of the base networks. A product
of ours has half the operations of its twin: where both reach the same rate, it takes half the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels import tuning
from deit.kernels.depthwise import mirror_depthwise
from deit.kernels.gelu import mirror_gelu
from deit.kernels.layer_norm import mirror_layer_norm
from deit.kernels.linear import mirror_linear

__all__ = ["Contest", "Duel", "compete", "contests"]

# ViTs, the most telling first: width, half of a head's width, tokens
SIZES = {"base": (768, 32, 197), "huge": (1280, 40, 257), "small": (384, 32, 197)}
SIZES["large"] = (1024, 32, 197)
ATEN = torch.ops.aten


class Step(NamedTuple):
    """An operation of ours, what the twin has in its place, and the work of ours.

    Attributes:
        op: as the tuner calls it.
        twin: implementations by name, of which the fastest counts.
        work: floating-point operations, or bytes if `unit` is "TB/s".
        factor: by which the twin has more work.
    """

    op: str
    twin: dict[str, Callable[[], object]]
    work: float
    unit: str = "TFLOP/s"
    factor: float = 2.0


class Contest(NamedTuple):
    """A function of ours with its gradients: the steps in the order in which they happen."""

    name: str
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    steps: list[Step]


@dataclass
class Duel:
    """A line of the report; milliseconds by implementation, none of ours where nothing competes."""

    name: str
    op: str
    ours: dict[str, float]
    twin: dict[str, float]
    work: float
    unit: str
    factor: float
    ratio: float | None = field(init=False)

    def __post_init__(self) -> None:
        best = min(self.ours.values(), default=None)
        self.ratio = min(self.twin.values()) / best if best else None

    def __str__(self) -> str:
        def side(times: dict[str, float], work: float) -> str:
            name = min(times, key=times.__getitem__)
            rate = work / times[name] / 1e9
            return f"{times[name]:7.3f} ms {rate:6.{1 if self.unit == 'TB/s' else 0}f} {name}"

        op = self.op.removeprefix("mirror_")
        ratio = "     -" if self.ratio is None else f"{self.ratio:5.2f}x"
        ours = side(self.ours, self.work) if self.ours else "not timed"
        twin = side(self.twin, self.factor * self.work)
        return f"{self.name:30} {op:19} {ratio} {self.unit:7} twin {twin}, ours {ours}"


def compete(contest: Contest, device: torch.device) -> list[Duel]:
    """Time all candidates of ours that agree with the plain formula, and the twin's."""
    timer = _milliseconds if device.type == "cpu" else tuning.cuda_milliseconds
    if device.type == "cuda":
        timer = partial(timer, without_launches=True)
    tuner = tuning.Tuner(timer=timer, timing_allowed=lambda device: True)
    leaves = [t.detach().requires_grad_() for t in contest.inputs]
    with mock.patch.object(tuning, "run", tuner.run):
        y = contest.function(*leaves)
        torch.autograd.grad(y, leaves, torch.randn_like(y))
    decisions, duels = tuner.report(), []
    for step in contest.steps:
        i = next(i for i, decision in enumerate(decisions) if decision.op == step.op)
        ours = decisions.pop(i).milliseconds
        with torch.no_grad():
            twin = {name: timer(run, inf) for name, run in step.twin.items()}
        duels.append(Duel(contest.name, step.op, ours, twin, *step[2:]))
    return duels


def _milliseconds(run: Callable[[], object], best: float) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def contests(
    device: torch.device, batch: int, rehearse: bool = False
) -> Iterator[tuple[str, Callable[[], Contest]]]:
    """Names, and functions that make the inputs."""
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    sizes = {"tiny": (16, 4, 5)} if rehearse else SIZES
    for size, (width, half, tokens) in sizes.items():
        rows = batch * tokens
        layers = {
            "qkv": (width, 3 * width, half, None),
            "fc1, gelu": (width, 4 * width, None, "gelu"),
            "fc2": (4 * width, width, None, None),
        }
        for layer, shape in layers.items():
            yield f"{size} {layer}", partial(_linear, f"{size} {layer}", make, rows, *shape)
        if size == next(iter(sizes)):
            for name, build in (("norm", _norm), ("gelu", _gelu), ("depthwise", _depthwise)):
                yield f"{size} {name}", partial(build, f"{size} {name}", make, batch, width, tokens)


def _linear(
    name: str,
    make: Callable[..., Tensor],
    rows: int,
    k: int,
    n: int,
    out_segment: int | None,
    act: str | None,
) -> Contest:
    x, w, bias, grad = make(rows, k), make(n, k) * k**-0.5, make(n), make(rows, n)
    half = 4 * rows * (n // 2) * (k // 2)  # of two products of half the width each way
    steps = [
        Step("mirror_linear", {"cuBLAS": lambda: grad @ w}, half),
        Step("mirror_linear_weight_grad", {"cuBLAS": lambda: grad.t() @ x}, half),
    ]
    if act is None:
        first = Step("mirror_linear", {"cuBLAS": lambda: F.linear(x, w, bias)}, half)
    else:
        run = {"cuBLAS, gelu": lambda: F.gelu(F.linear(x, w, bias))}
        first = Step("mirror_linear_act", run, half)
    function = partial(mirror_linear, out_segment=out_segment, act=act)
    weights = [t.clone() for t in (w[: n // 2, : k // 2], w[n // 2 :, k // 2 :])]
    name = f"{name} {rows}x{k}->{n}"
    return Contest(name, function, (x, *weights, bias[: n // 2].clone()), [first, *steps])


def _norm(name: str, make: Callable[..., Tensor], batch: int, width: int, tokens: int) -> Contest:
    x, grad, rows = make(batch, tokens, width), make(batch, tokens, width), batch * tokens
    weight, bias = make(width), make(width)
    _, mean, rstd = ATEN.native_layer_norm(x, [width], weight, bias, 1e-6)

    def backward() -> object:
        mask = [True] * 3
        return ATEN.native_layer_norm_backward(grad, x, [width], mean, rstd, weight, bias, mask)

    forward = {"torch": lambda: F.layer_norm(x, (width,), weight, bias, 1e-6)}
    size = 2 * rows * width  # bytes
    steps = [
        Step("mirror_layer_norm", forward, 2 * size, "TB/s", 1.0),
        Step("mirror_layer_norm_backward", {"torch": backward}, 3 * size, "TB/s", 1.0),
    ]
    return Contest(name, mirror_layer_norm, (x, weight, bias), steps)


def _gelu(name: str, make: Callable[..., Tensor], batch: int, width: int, tokens: int) -> Contest:
    x, grad = make(batch, tokens, 4 * width), make(batch, tokens, 4 * width)
    steps = [
        Step("mirror_gelu", {"torch": lambda: F.gelu(x)}, 2 * x.nbytes, "TB/s", 1.0),
        Step(
            "mirror_gelu_backward",
            {"torch": lambda: ATEN.gelu_backward(grad, x)},
            3 * x.nbytes,
            "TB/s",
            1.0,
        ),
    ]
    return Contest(name, mirror_gelu, (x,), steps)


def _depthwise(
    name: str, make: Callable[..., Tensor], batch: int, width: int, tokens: int
) -> Contest:
    """The twin's convolution in both formats of memory."""
    side = int(tokens**0.5)
    x, grad = make(batch, side, side, width), make(batch, side, side, width)
    kernel, bias = make(width, 1, 7, 7), make(width)
    formats = {
        "channels last": (x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)),
        "contiguous": tuple(t.permute(0, 3, 1, 2).contiguous() for t in (x, grad)),
    }

    def forward(x: Tensor, grad: Tensor) -> Tensor:
        return F.conv2d(x, kernel, bias, padding=3, groups=width)

    def backward(mask: list[bool], x: Tensor, grad: Tensor) -> object:
        return ATEN.convolution_backward(
            grad, x, kernel, [width], [1, 1], [3, 3], [1, 1], False, [0, 0], width, mask
        )

    def twin(run: Callable[..., object]) -> dict[str, Callable[[], object]]:
        return {key: partial(run, *maps) for key, maps in formats.items()}

    steps = [
        Step("mirror_depthwise", twin(forward), 2 * x.nbytes, "TB/s", 1.0),
        Step(
            "mirror_depthwise_input",
            twin(partial(backward, [True, False, False])),
            2 * x.nbytes,
            "TB/s",
            1.0,
        ),
        Step(
            "mirror_depthwise_taps",
            twin(partial(backward, [False, True, True])),
            2 * x.nbytes,
            "TB/s",
            1.0,
        ),
    ]
    return Contest(name, mirror_depthwise, (x, make(width, 1, 7, 4), bias), steps)
