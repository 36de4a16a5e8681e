"""The check of one layer or network: every feature inside, its output, gradients, ordinary twin.

For an orthogonal action the backward pass of an equivariant layer is equivariant too: with input
g x and the gradient g c of some loss in the output, the gradient in the input must be g times what
it was, and the gradients in the parameters must not change at all.

What is promised depends on the network. Equivariant and invariant-early ones are invariant to the
end. A hybrid is equivariant up to and including its bridge, and nothing is promised of its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from deit import layers as L
from deit.equivariance import Action, Feature, as_parts, invariant, measure, randomize_, worst
from deit.groups import FLOP
from deit.verify.rules import INTO, OUT_OF, Rule, Rules
from deit.verify.settings import Settings
from deit.verify.trace import Event, Trace, first_failure, measure_batch, together

__all__ = ["Case", "Result", "check", "gradient_errors", "is_far_off"]

BLOCKS = (L.Block, L.OrdinaryBlock, L.MixerBlock, L.ConvBlock)
HALVES = (torch.bfloat16, torch.float16)
# For layers and for networks. Gradients go through every layer of a network twice, and some are
# small differences of large terms: they are compared relative to the largest of them, and may be
# off by so many tolerances. 16-bit gradients of a network differ by more than would be telling.
FLOOR, SLACK = (1e-2, 1.0), (1.0, 128)
INPUT, TRAINING = "the input", "the output in training"


@dataclass(frozen=True, eq=False)
class Case:
    """What to check, a layer or a network.

    Attributes:
        name, variant: for the table.
        is_network: its gradients are compared with more tolerance, on one natural and one random
            sample, so that a large network's activations fit, and not in 16-bit arithmetic.
    """

    name: str
    variant: str = ""
    group = FLOP
    is_network = False

    def __str__(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name

    def build(self) -> nn.Module:
        """The module, with any parameters."""
        raise NotImplementedError

    def build_twin(self) -> nn.Module:
        """The ordinary module of the same job, which the same check must refuse: a function of the
        input's parts, and if there are several of the output's, side by side on the last axis."""
        raise NotImplementedError

    def inputs(self, count: int, seed: int) -> Feature:
        """`count` natural samples, then `count` random ones; float64, on the CPU."""
        raise NotImplementedError

    def rules(self, module: nn.Module) -> Rules:
        """How the group acts on its features."""
        return Rules(module, self.group)

    def maps(self, module: nn.Module) -> list[tuple[str, Rule]]:
        """Names and rules of what its `forward_intermediates` hands out."""
        return []


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        events: measurements, in the order of computation; the last are of maps and of the output.
        depth: number of blocks.
        promised: whether anything is promised of the output.
        output: its error, promised or not.
        gradients: relative errors by name, and of the output in training; none if not compared.
        compiled: how far the compiled output is from that of eager code; None if not compiled.
        twin: the ordinary twin's error, in float32.
    """

    case: Case
    settings: Settings
    depth: int
    promised: bool
    events: list[Event]
    output: float
    gradients: Mapping[str, float]
    compiled: float | None
    twin: float
    unseen: list[str] = field(default_factory=list)

    @property
    def tolerance(self) -> float:
        return self.settings.tolerance(self.depth)

    @property
    def culprit(self) -> Event | None:
        """The first event that fails."""
        return first_failure(self.events, self.tolerance)

    @property
    def worst(self) -> Event:
        """The first event that fails, or else the one with the largest error."""
        return self.culprit or max(self.events, key=lambda event: event.measurement.error)

    @property
    def layers(self) -> int:
        """How many layers have been measured."""
        return len({event.layer for event in self.events})

    @property
    def gradient(self) -> float | None:
        return worst(*self.gradients.values()) if self.gradients else None

    @property
    def contrast(self) -> float:
        return min(event.measurement.contrast for event in self.events)

    def error(self, kind: slice = slice(None)) -> float:
        """The largest error of features on the samples of a slice: all, natural or random ones."""
        rows = [event.measurement.errors for event in self.events]
        samples = 2 * self.settings.count
        return worst(*(error for row in rows if len(row) == samples for error in row[kind]))

    @property
    def failures(self) -> list[str]:
        """What does not hold, in words."""
        tol, failures = self.tolerance, []
        if event := self.culprit:
            failures.append(f"{event} ({event.kind}): {event.measurement.problem(tol)}")
        limit = SLACK[self.case.is_network] * tol
        wrong = [name for name, error in self.gradients.items() if not error <= limit]
        if wrong:
            error = worst(*(self.gradients[name] for name in wrong))
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            where = f"{wrong[0]}{more}"
            failures.append(f"gradients, {where}: error {error:.1e} > tolerance {limit:.1e}")
        if self.compiled is not None and not self.compiled <= tol:
            failures.append(f"compiling changes the output: error {self.compiled:.1e} > {tol:.1e}")
        if not is_far_off(self.twin, self.output if self.promised else 0.0, tol):
            failures.append(f"the ordinary twin is hardly worse (error {self.twin:.1e})")
        return failures + [f"{name} was never measured" for name in self.unseen]


def is_far_off(twin: float, own: float, tol: float) -> bool:
    """Whether an ordinary twin's error is beyond doubt: ten times our own, and two tolerances."""
    return twin > max(10 * own, 2 * tol)


def check(
    case: Case, settings: Settings, module: nn.Module | None = None, train: bool = True
) -> Result:
    """Check a case with random parameters, or `module` as it is.

    The whole batch, first the samples and then the same ones moved, goes through in one pass.

    Args:
        train: whether to compare gradients too, where they are promised and telling.
    """
    place = {"device": settings.device, "dtype": settings.dtype}
    module = randomize_(case.build(), settings.seed) if module is None else module
    module = module.to(**place).eval()
    rules, order = case.rules(module), range(case.group.order)
    x = case.inputs(settings.count, settings.seed)
    x = _each(lambda part: part.to(**place), x)
    before = rules.rule(module, INTO, x).act
    batch = together([before(g, x) for g in order])

    compiled = None
    with torch.no_grad(), settings.autocast():
        with Trace(module, rules) as trace:
            y = module(batch)
        run = settings.compiled(module)
        if run is not module:
            eager, y = y, run(batch)
            compiled = max(measure(y, [(0, eager)], invariant).errors)
        events = trace.events + _maps(case, module, batch, settings)
    after = rules.rule(module, OUT_OF, y)
    promised = after is not None
    after = after or Rule(invariant)
    output = measure_batch(y, after, case.group)
    widths = [part.shape[-1] for part in y] if isinstance(y, tuple) else None
    if promised and run is not module:
        events.append(Event("", "compiled", OUT_OF, output))
    gradients = {}
    if train and promised and not (case.is_network and settings.compute_dtype in HALVES):
        picked = x[[0, settings.count]] if case.is_network else x
        gradients = _train(case, module, run, picked, before, after, settings)
    return Result(
        case,
        settings,
        sum(isinstance(m, BLOCKS) for m in module.modules()),
        promised,
        events,
        output.error,
        gradients,
        compiled,
        _twin_error(case, batch, widths, after, settings),
        _never_measured(module, trace),
    )


def _each(change: Callable[..., Tensor], *features: Feature) -> Feature:
    """Change features part by part."""
    first = features[0]
    return tuple(map(change, *features)) if isinstance(first, tuple) else change(*features)


def _never_measured(module: nn.Module, trace: Trace) -> list[str]:
    """Layers with parameters that no hook has seen have not been checked; the outermost ones."""
    unseen: list[str] = []
    for name, layer in module.named_modules():
        has_own = any(True for _ in layer.parameters(recurse=False)) or isinstance(layer, BLOCKS)
        inside = any(name.startswith(f"{outer}.") for outer in unseen)
        missed = has_own and not inside and name not in trace.seen
        if missed and trace.rules.promises(layer):
            unseen.append(name)
    return unseen


def _maps(case: Case, module: nn.Module, batch: Feature, settings: Settings) -> list[Event]:
    """The maps that a network hands out are flipped, and half of their channels negated."""
    promised = case.maps(module)
    if not promised:
        return []
    found = settings.compiled(module.forward_intermediates)(batch, intermediates_only=True)
    return [
        Event(f"map of {name}", "map", OUT_OF, measure_batch(y, rule, case.group))
        for (name, rule), y in zip(promised, found, strict=False)
    ]


def _train(
    case: Case,
    module: nn.Module,
    run: Callable[[Any], Feature],
    x: Feature,
    before: Action,
    after: Rule,
    settings: Settings,
) -> dict[str, float]:
    """Relative errors of gradients in the input and in parameters, and of the output in training,
    which may take other paths through a layer than inference."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    module.train()

    def backward(g: int) -> tuple[Feature, dict[str, Tensor]]:
        inputs = _each(lambda part: part.detach().requires_grad_(), before(g, x))
        torch.manual_seed(settings.seed)  # the same masks of stochastic depth for each element
        with settings.autocast():
            y = run(inputs)
        # linear, for a loss that saturates would amplify the rounding of the output
        generator = torch.Generator().manual_seed(1)
        weights = _each(
            lambda part: torch.randn(part.shape, generator=generator, dtype=torch.float64), y
        )
        values = torch.autograd.grad(
            as_parts(y),
            [*as_parts(inputs), *parameters.values()],
            as_parts(_each(torch.Tensor.to, after.act(g, weights), y)),
            materialize_grads=True,
        )
        count = len(as_parts(x))
        of_input = values[:count] if isinstance(x, tuple) else values[0]
        names = [f"{INPUT}, part {i}" for i in range(count)] if count > 1 else [INPUT]
        found = dict(zip(names, as_parts(before(case.group.inverse(g), of_input)), strict=True))
        return y, found | dict(zip(parameters, values[count:], strict=True))

    y, expected = backward(0)
    errors = {TRAINING: 0.0}
    for g in range(1, case.group.order):
        z, found = backward(g)
        found = gradient_errors(expected, found, FLOOR[case.is_network])
        found[TRAINING] = measure(y, [(g, z)], after.act).error
        errors |= {name: worst(error, errors.get(name, 0.0)) for name, error in found.items()}
    module.eval()
    return errors


def gradient_errors(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], floor: float
) -> dict[str, float]:
    """Relative error of each gradient.

    A gradient much smaller than the others is what rounding leaves of terms that cancel, so no
    error is taken relative to less than `floor` times the largest norm. If all gradients vanish,
    the errors are NaN.
    """

    def norm(gradient: Tensor) -> float:
        return float(torch.linalg.vector_norm(gradient.double()))

    norms = {name: norm(gradient) for name, gradient in expected.items()}
    least = floor * worst(*norms.values())
    return {
        name: norm(found[name].double() - gradient.double()) / worst(norms[name], least)
        if least != 0
        else nan
        for name, gradient in expected.items()
    }


def _twin_error(
    case: Case, batch: Feature, widths: list[int] | None, after: Rule, settings: Settings
) -> float:
    """The error of the ordinary twin with random parameters; it gives parts of `widths`, if any."""
    place = {"device": settings.device, "dtype": torch.float32}
    twin = randomize_(case.build_twin(), settings.seed).to(**place).eval()
    x = torch.cat(batch, -1) if isinstance(batch, tuple) else batch
    with torch.no_grad():
        y = twin(x.to(**place))
    return measure_batch(y.split(widths, -1) if widths else y, after, case.group).error
