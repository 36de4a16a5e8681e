"""Whether compiled code may launch the kernels by itself: tried once for each device.

The kernels of direct.py reach compiled code through parts of torch and Triton that change from
version to version. A small attention-like pair of linear maps and a perceptron are compiled and
compared with the plain formulas, forward and backward; unless all agree, compiled code goes on
calling the opaque operations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deit.kernels import backends, tuning
from deit.kernels.choice import get_mode
from deit.kernels.gelu import plain_gelu
from deit.kernels.linear import mirror_linear
from deit.kernels.perceptron import mirror_perceptron

__all__ = ["trust_compiler"]

TOLERANCE = 3e-2  # of bfloat16 through four products
ROWS, WIDTH, HIDDEN, HALF_HEAD = 136, 64, 80, 32  # per irrep; no size fills all tiles

_tried: dict[torch.device, bool] = {}


def trust_compiler(device: torch.device | str) -> bool:
    """Let code that `torch.compile` makes from now on launch the kernels by itself, if it can.

    Call it before anything is compiled. The first call for a device takes a few seconds, later
    ones none. Nothing is tried, and nothing changes, except on GPUs that the kernels support, and
    with `--kernels plain`.

    Returns:
        Whether it is so. If the trial fails, a warning says why.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if get_mode() == "plain" or not backends.device_compiles(device):
        return False
    if device not in _tried:
        # an interpreter of kernels on the CPU, in tests, has no compiler beside it
        _tried[device] = _passes(device, "inductor" if device.type == "cuda" else "aot_eager")
    return _tried[device]


def _passes(device: torch.device, backend: str) -> bool:
    try:
        if backends.direct() is None:
            raise RuntimeError("Triton cannot be imported")
        backends.trusted.add(device)
        _try(device, backend)
    except Exception as error:
        backends.trusted.discard(device)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(
            f"compiled code on {device} calls the fused operations through Python, which slows "
            f"small networks down: launching their kernels directly failed with {reason}",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True


def _inputs(device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return x * scale

    shapes = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)]
    inputs = [normal(2, ROWS // 2, 2 * WIDTH)]
    for n, k in shapes:
        inputs += [normal(n, k, scale=k**-0.5), normal(n, k, scale=k**-0.5), normal(n)]
    return inputs


def _attend(packed: Tensor) -> Tensor:
    """Some function of queries, keys and values of each head, as cheap to compile as can be."""
    q, k, v = packed.unflatten(-1, (3, -1)).unbind(-2)
    return q * torch.sigmoid(k) + v


def _fused(x: Tensor, *weights: Tensor) -> Tensor:
    qkv, proj, fc1, fc2 = (weights[i : i + 3] for i in range(0, 12, 3))
    y = _attend(mirror_linear(x, *qkv, out_segment=HALF_HEAD))
    x = x + mirror_linear(y, *proj, in_segment=HALF_HEAD)
    return x + mirror_perceptron(x, fc1[:2], fc1[2], fc2[:2], fc2[2], "gelu")


def _plain(x: Tensor, *weights: Tensor) -> Tensor:
    def linear(x: Tensor, sym: Tensor, asym: Tensor, bias: Tensor) -> Tensor:
        s, a = x.chunk(2, -1)
        return torch.cat([F.linear(s, sym, bias), F.linear(a, asym)], -1)

    qkv, proj, fc1, fc2 = (weights[i : i + 3] for i in range(0, 12, 3))
    packed = linear(x, *qkv).unflatten(-1, (2, -1, HALF_HEAD)).transpose(-3, -2).flatten(-3)
    y = _attend(packed).unflatten(-1, (-1, 2, HALF_HEAD)).transpose(-3, -2).flatten(-3)
    x = x + linear(y, *proj)
    return x + linear(plain_gelu(linear(x, *fc1), "gelu"), *fc2)


def _results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The result of `function`, without and with gradients, and the gradients."""
    with torch.no_grad():
        y = function(*inputs)
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        z = function(*leaves)
        gradients = torch.autograd.grad(z.float().square().mean(), leaves)
    return [y, z.detach(), *gradients]


def _try(device: torch.device, backend: str) -> None:
    """Raise unless compiled code agrees with the plain formulas."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    as_usual = torch.inference_mode(False), torch.autocast(device.type, enabled=False)
    with as_usual[0], as_usual[1], tuning.only("triton"):
        exact = [t.to(dtype).float() for t in _inputs(device)]
        expected = _results(_plain, exact)
        compiled = torch.compile(_fused, fullgraph=True, backend=backend, dynamic=False)
        actual = _results(compiled, [t.to(dtype) for t in exact])
    for i, (e, a) in enumerate(zip(expected, actual, strict=True)):
        wrong = tuning._disagreement(e, a.to(e.dtype), TOLERANCE)
        if wrong is not None:
            raise RuntimeError(f"result {i} {wrong}")
