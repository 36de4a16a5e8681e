"""The check of one layer: its output, and the gradients that flow back through it.

For an orthogonal action the backward pass of an equivariant layer is equivariant too: with input
g x and the gradient g c of some loss in the output, the gradient in the input must be g times what
it was, and the gradients in the parameters must not change at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deit.equivariance import randomize_
from deit.verify import samples
from deit.verify.cases import LAYER_CASES, LayerCase
from deit.verify.measure import Measurement, gradient_errors, is_far_off, measure, worst
from deit.verify.settings import Settings

__all__ = ["LAYER_CASES", "LayerResult", "check_layer"]

GRADIENT_FLOOR = 1e-2
TRAINING, INPUT = "output in training", "gradient in the input"


@dataclass(frozen=True)
class LayerResult:
    """`training`: relative error of output and gradients in training, by name; `twin`: the error
    of the ordinary layer."""

    case: LayerCase
    settings: Settings
    output: Measurement
    training: dict[str, float]
    twin: float
    failures: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """The largest error of all; NaN if any is."""
        return worst(self.output.error, *self.training.values())


def check_layer(case: LayerCase, settings: Settings) -> LayerResult:
    """Check one case with random parameters."""
    tol, place = settings.tolerance(), {"device": settings.device, "dtype": settings.dtype}
    x = _inputs(case, settings).to(**place)
    moves = [(g, case.before.act(g, x)) for g in range(1, case.group.order)]
    layer = randomize_(case.build(), settings.seed).to(**place)
    run = _runner(settings.compiled(layer), settings)

    # inference and training may take different paths through a layer
    layer.train(case.draws)
    with torch.no_grad():
        output = measure(run(x), [(g, run(moved)) for g, moved in moves], case.after)
    layer.train()
    training = _train(case, layer, run, x, moves)
    failures = [f"output: {problem}"] if (problem := output.problem(tol)) else []
    failures += [
        f"{name}: error {error:.1e} > tolerance {tol:.1e}"
        for name, error in training.items()
        if not error <= tol
    ]

    run = _runner(randomize_(case.twin(), settings.seed).to(**place).eval(), settings)
    with torch.no_grad():
        off = measure(run(x), [(g, run(moved)) for g, moved in moves], case.after).error
    if not is_far_off(off, output.error, tol):
        failures.append(f"the ordinary twin is hardly worse (error {off:.1e})")
    return LayerResult(case, settings, output, training, off, failures)


def _inputs(case: LayerCase, settings: Settings) -> Tensor:
    channels, *size = case.shape
    if channels == 3:
        return case.arrange(samples.images(settings.count, tuple(size), settings.seed))
    return case.arrange(samples.features(settings.count, tuple(size), channels, settings.seed))


def _runner(module: nn.Module, settings: Settings) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        torch.manual_seed(settings.seed)  # the same masks of stochastic depth in each call
        with settings.autocast():
            return module(x)

    return run


def _train(
    case: LayerCase,
    layer: nn.Module,
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    moves: list[tuple[int, Tensor]],
) -> dict[str, float]:
    """Relative errors of the output in training, and of gradients in the input and parameters."""
    parameters = dict(layer.named_parameters())
    with torch.no_grad():
        shape = run(x).shape
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(shape, generator=generator, dtype=torch.float64).to(x.device)

    def backward(g: int, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        x = x.detach().requires_grad_()
        y = run(x)
        grads = torch.autograd.grad(
            y, [x, *parameters.values()], case.after.act(g, cotangent).to(y), allow_unused=True
        )
        names = [INPUT, *(f"gradient in {name}" for name in parameters)]
        return y, dict(zip(names, grads, strict=True))

    y, expected = backward(0, x)
    errors: dict[str, float] = {}
    for g, moved in moves:
        z, found = backward(g, moved)
        want = {**expected, INPUT: case.before.act(g, expected[INPUT])}
        for name, error in gradient_errors(want, found, GRADIENT_FLOOR).items():
            errors[name] = worst(error, errors.get(name, 0.0))
        output = measure(y, [(g, z)], case.after).error
        errors[TRAINING] = worst(output, errors.get(TRAINING, 0.0))
    return errors
