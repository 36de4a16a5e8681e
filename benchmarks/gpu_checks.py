"""Are the fused paths right on this device? Operations against float64, networks against plain.

Used by gpu_report.py. An operation runs twice with the same inputs: the first call decides which
implementation is used, the second one uses it. Its plain formula in float64 is the truth for the
result and for all gradients. Networks have random weights, so that no layer hides another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from deit import kernels
from deit.equivariance import randomize_
from deit.kernels import tuning
from deit.kernels.depthwise import mirror_depthwise
from deit.kernels.gelu import mirror_gelu
from deit.kernels.layer_norm import mirror_layer_norm
from deit.kernels.linear import mirror_linear

__all__ = ["CASES", "Case", "Finding", "check_network", "check_operation"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# relative to the norm, of results and of gradients: a few roundings of each dtype
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 2e-5}
# of networks: rounding grows with depth
NETWORK_TOLERANCE = 1e-4


class Finding(NamedTuple):
    """A line of the report; `numbers` are relative errors by name."""

    name: str
    passed: bool
    numbers: dict[str, float]

    def __str__(self) -> str:
        numbers = "  ".join(f"{name} {value:.1e}" for name, value in self.numbers.items())
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name:44} {numbers}"


@dataclass(frozen=True)
class Case:
    """An operation on random inputs.

    Attributes:
        shapes: of the inputs.
        strided: give every input rows of a larger tensor.
        every: let all candidates compete, and so be checked; else the first one runs.
    """

    name: str
    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    strided: bool = False
    every: bool = False


def _cases() -> Iterator[Case]:
    def linear(rows: tuple[int, ...], k: int, n: int, **options: Any) -> Case:
        shapes = ((*rows, 2 * k), (n, k), (n, k), (n,))
        strided = options.pop("strided", False)

        def run(x: Tensor, ws: Tensor, wa: Tensor, bias: Tensor) -> Tensor:
            return mirror_linear(x, ws, wa, bias, **options)

        words = "".join(f" {key}={value}" for key, value in options.items())
        return Case(f"linear {k}->{n}{words}", run, shapes, strided, every=k > 300)

    yield linear((33, 7), 72, 40, strided=True)
    yield linear((33, 7), 72, 40, act="quick_gelu", strided=True)
    yield linear((64, 197), 384, 1536, act="gelu")
    yield linear((64, 197), 384, 1152, out_segment=32)
    yield linear((64, 197), 384, 384, in_segment=32)
    for act in ("gelu", "quick_gelu"):
        function = lambda x, act=act: mirror_gelu(x, act)  # noqa: E731
        yield Case(f"nonlinearity {act}", function, ((37, 3, 150),), strided=True)
    yield Case("nonlinearity gelu, 3072 wide", mirror_gelu, ((64, 197, 3072),), every=True)
    yield Case("layer norm", mirror_layer_norm, ((37, 3, 150), (150,), (150,)), strided=True)
    shapes = ((64, 197, 768), (768,), (768,))
    yield Case("layer norm, 768 wide", mirror_layer_norm, shapes, every=True)
    for maps in ((3, 9, 18, 72), (2, 7, 5, 8), (5, 1, 1, 4)):
        shapes = (maps, (maps[-1], 1, 7, 4), (maps[-1],))
        yield Case(f"depthwise {maps[1]}x{maps[2]}x{maps[3]}", mirror_depthwise, shapes, True)
    shapes = ((64, 14, 14, 768), (768, 1, 7, 4), (768,))
    yield Case("depthwise 14x14x768", mirror_depthwise, shapes, every=True)


CASES = tuple(_cases())


def _error(actual: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return float((actual.double() - exact).norm() / exact.norm())


def _with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor | None
) -> list[Tensor]:
    """The result, then the gradient of every input; a random `grad` if there is none."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    result = function(*inputs)
    grad = torch.randn_like(result) if grad is None else grad
    return [result.detach(), *torch.autograd.grad(result, inputs, grad)]


def check_operation(case: Case, dtype: torch.dtype, device: torch.device) -> Finding:
    """Result and gradients in `dtype`; of the first Triton kernel, or of what is chosen."""
    torch.manual_seed(0)
    inputs = []
    for shape in case.shapes:
        ragged = 8 if case.strided and len(shape) > 1 else 0
        wide = torch.randn(*shape[:-1], shape[-1] + ragged, device=device, dtype=dtype)
        inputs.append(wide[..., ragged:])
    with nullcontext() if case.every else tuning.only("triton"):
        result, *_ = _with_gradients(case.function, inputs, None)
        grad = torch.randn_like(result)
        for _ in range(2):
            actual = _with_gradients(case.function, inputs, grad)
    exact = _with_gradients(case.function, [t.double() for t in inputs], grad.double())
    errors = [_error(a, e) for a, e in zip(actual, exact, strict=True)]
    numbers = {"result": errors[0], "gradients": max(errors[1:])}
    name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
    passed = all(error <= TOLERANCE[dtype] for error in errors)
    return Finding(name, passed, numbers)


def check_network(name: str, device: torch.device, batch: int, **kwargs: Any) -> Finding:
    """Logits and gradients with fused paths against those of plain formulas in float32.

    With bfloat16 autocast both differ from it by rounding, and fused paths may by half as much
    again as plain ones. `flopped` is how far the logits of mirrored images are from the images'.
    """
    torch.manual_seed(0)
    model = randomize_(timm.create_model(name, **kwargs)).to(device).eval()
    size = kwargs.get("img_size") or 224
    images = torch.randn(batch, 3, size, size, device=device)
    with kernels.plain():
        exact = _logits_and_gradients(model, images)
        rounded = _distances(_logits_and_gradients(model, images, torch.bfloat16), exact)
    wide, half = [], []
    for _ in range(2):  # the first time chooses
        wide = _distances(_logits_and_gradients(model, images), exact)
        half = _distances(_logits_and_gradients(model, images, torch.bfloat16), exact)
    with torch.no_grad():
        logits, flopped = model(images), model(images.flip(-1))
    numbers = {
        "float32": wide[0],
        "grad": wide[1],
        "bf16": half[0],
        "(plain)": rounded[0],
        "bf16 grad": half[1],
        "(plain) ": rounded[1],
        "flopped": _error(flopped, logits),
    }
    passed = (
        max(wide[0], numbers["flopped"]) <= NETWORK_TOLERANCE
        and wide[1] <= 10 * NETWORK_TOLERANCE
        and all(h <= 1.5 * r + 1e-3 for h, r in zip(half, rounded, strict=True))
    )
    return Finding(name, passed, numbers)


def _logits_and_gradients(
    model: nn.Module, images: Tensor, autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Logits, and the gradients of all parameters in one vector."""
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        logits = model(images).float()
    loss = logits.square().mean()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    return logits.detach(), torch.cat([g.flatten().float() for g in gradients])


def _distances(actual: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> list[float]:
    return [_error(a, e) for a, e in zip(actual, exact, strict=True)]
