"""The check of one layer or network: every feature inside, its output, gradients, ordinary twin.

For an orthogonal action the backward pass of an equivariant layer is equivariant too: with input
g x and the gradient g c of some loss in the output, the gradient in the input must be g times what
it was, and the gradients in the parameters must not change at all.

What is promised depends on the network. Equivariant and invariant-early ones are invariant to the
end. A hybrid is equivariant up to and including its bridge, and nothing is promised of its logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deit.equivariance import (
    Action,
    Feature,
    as_parts,
    invariant,
    map_parts,
    measure,
    randomize_,
    tolerance_of,
    worst,
)
from deit.groups import FLOP, Group
from deit.train.compilation import compile_network
from deit.train.engine import lower_precision
from deit.verify import samples
from deit.verify.rules import INTO, OUT_OF, Rule, Rules, packed_map
from deit.verify.trace import BLOCKS, Event, measure_batch, trace

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
# For layers and for networks. Gradients go through every layer of a network twice, and some are
# small differences of large terms: they are compared relative to the largest of them, and may be
# off by so many tolerances. 16-bit gradients of a network differ by more than would be telling.
FLOOR, SLACK = (1e-2, 1.0), (1.0, 128)


@dataclass(frozen=True)
class Settings:
    """How to check.

    Attributes:
        dtype: of parameters and images.
        count: natural images, and random ones.
        amp: automatic mixed precision; parameters and images are float32 then.
        compile_mode: check what `torch.compile` makes in this mode too; None for not.
        compile_blocks: compile each block of a network by itself.
    """

    dtype: torch.dtype = torch.float64
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a device is immutable
    count: int = 2
    seed: int = 0
    amp: bool = False
    compile_mode: str | None = None
    compile_blocks: bool = False

    @property
    def compute_dtype(self) -> torch.dtype:
        """What features are rounded to."""
        return lower_precision(self.device) if self.amp else self.dtype

    @property
    def arithmetic(self) -> str:
        """For tables."""
        name = str(self.compute_dtype).removeprefix("torch.")
        return f"amp {name}" if self.amp else name

    def autocast(self) -> torch.autocast:
        """To be entered around a forward pass."""
        low = lower_precision(self.device)
        return torch.autocast(self.device.type, low, enabled=self.amp)


@dataclass(frozen=True, eq=False)
class Case:
    """A layer or a network to check.

    Attributes:
        name, variant: for the table.
        build: makes the module, whose parameters are made random.
        build_twin: makes the ordinary module of the same job, which the same check must refuse: a
            function of the input's parts, and if there are several of the output's, side by side
            on the last axis.
        size: height and width of the input.
        form: of the input. "image" is one of three colours, "maps" are parts (B, H, W, C/2),
            "tokens" parts (B, N, C/2) of a grid of this size.
        is_network: its gradients are compared with more tolerance, on one natural and one random
            sample, so that a large network's activations fit, and not in 16-bit arithmetic.
        trained: the module to check as it is, in place of what `build` makes.
    """

    name: str
    variant: str
    build: Callable[[], nn.Module]
    build_twin: Callable[[], nn.Module]
    size: tuple[int, int]
    form: str = "image"
    group: Group = FLOP
    is_network: bool = False
    trained: nn.Module | None = None

    def __str__(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name

    def inputs(self, count: int, seed: int) -> Feature:
        """`count` natural samples, then as many random ones; float64, on the CPU."""
        if self.form == "image":
            return samples.images(count, self.size, seed)
        x = samples.features(count, self.size, seed)
        rep = self.group.regular(samples.WIDTH)
        return tuple(rep.split(x if self.form == "maps" else x.flatten(1, 2)))


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        events: measurements, in the order of computation; the last are of maps and of the output.
        unseen: layers that should have been measured, and were not.
        promised: whether anything is promised of the output.
        output: its error, promised or not.
        compiled: how far the compiled output is from that of eager code; None if not compiled.
        gradients: relative errors by name, and of the output in training; none if not compared.
        twin: the ordinary twin's error, in float32; None if not measured.
    """

    case: Case
    settings: Settings
    tolerance: float
    events: list[Event]
    unseen: list[str]
    promised: bool
    output: float
    compiled: float | None
    gradients: Mapping[str, float]
    twin: float | None

    @property
    def culprit(self) -> Event | None:
        """The first event that fails."""
        failing = (each for each in self.events if each.measurement.problem(self.tolerance))
        return next(failing, None)

    @property
    def worst(self) -> Event:
        """The first event that fails, or else the one with the largest error."""
        return self.culprit or max(self.events, key=lambda event: event.measurement.error)

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
        wrong = {name: error for name, error in self.gradients.items() if not error <= limit}
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            error = worst(*wrong.values())
            failures.append(
                f"gradients, {next(iter(wrong))}{more}: error {error:.1e} > tolerance {limit:.1e}"
            )
        if self.compiled is not None and not self.compiled <= tol:
            failures.append(f"compiling changes the output: error {self.compiled:.1e} > {tol:.1e}")
        beyond_doubt = max(10 * self.output if self.promised else 0.0, 2 * tol)
        if self.twin is not None and not self.twin > beyond_doubt:
            failures.append(f"the ordinary twin is hardly worse (error {self.twin:.1e})")
        return failures + [f"{name} was never measured" for name in self.unseen]


def check(case: Case, settings: Settings, features_only: bool = False) -> Result:
    """Check a layer or a network.

    The whole batch, first the samples and then the same ones moved, goes through in one pass.

    Args:
        features_only: leave out gradients and the twin. Gradients are compared only where they are
            promised and telling.
    """
    place = {"device": settings.device, "dtype": settings.dtype}
    module = case.trained
    if module is None:
        module = randomize_(case.build(), settings.seed)
    module = module.to(**place).eval()
    rules, group = Rules(module, case.size, case.group), case.group
    x = map_parts(lambda part: part.to(**place), case.inputs(settings.count, settings.seed))
    before = rules.rule(module, INTO, x).act
    moved = [as_parts(before(g, x)) for g in range(group.order)]
    parts = tuple(map(torch.cat, zip(*moved, strict=True)))
    batch = parts if isinstance(x, tuple) else parts[0]

    compiled = None
    with torch.no_grad(), settings.autocast():
        y, events, unseen = trace(module, rules, batch)
        if settings.compile_mode is not None:
            blocks = settings.compile_blocks and case.is_network
            module, eager = _compiled_copy(module, settings.compile_mode, blocks), y
            y = module(batch)
            compiled = measure([y, eager], invariant).error
        events += _maps(module, batch, group)
    after = rules.rule(rules.network, OUT_OF, y)
    promised, after = after is not None, after or Rule(invariant)
    output = measure_batch(y, after, group)
    if promised and compiled is not None:
        events.append(Event("", "compiled", OUT_OF, output))
    gradients, twin_error = {}, None
    if not features_only:
        if promised and not (case.is_network and settings.compute_dtype.itemsize == 2):
            picked = x[[0, settings.count]] if case.is_network else x
            gradients = _train(case, module, picked, before, after.act, settings)
        twin = randomize_(case.build_twin(), settings.seed).to(settings.device).eval()
        with torch.no_grad():
            of_twin = twin(torch.cat(parts, -1).float())
        if isinstance(y, tuple):
            of_twin = of_twin.split([part.shape[-1] for part in y], -1)
        twin_error = measure_batch(of_twin, after, group).error
    depth = sum(isinstance(m, BLOCKS) for m in module.modules())
    tol = tolerance_of(settings.compute_dtype, depth)
    return Result(
        case, settings, tol, events, unseen, promised, output.error, compiled, gradients, twin_error
    )


def _compiled_copy(module: nn.Module, mode: str, blocks: bool) -> nn.Module:
    """What torch compiles a module to, and the maps that it hands out if it is a network."""
    # each case is a new network: without this, recompilations stop at a limit, silently
    torch.compiler.reset()
    module = copy.deepcopy(module)
    compile_network(module, mode, blocks=blocks)
    if not blocks and hasattr(module, "forward_intermediates"):
        module.forward_intermediates = torch.compile(module.forward_intermediates, mode=mode)
    return module


def _maps(module: nn.Module, batch: Feature, group: Group) -> list[Event]:
    """The maps that a network hands out are flipped, and half of their channels negated.

    Nothing is promised of those behind the bridge of a hybrid, which have no symmetric channels.
    """
    if not hasattr(module, "feature_info"):
        return []
    maps = module.forward_intermediates(batch, intermediates_only=True)
    counts = [info["symmetric_channels"] for info in module.feature_info]
    names = [f"map of {info['module']}" for info in module.feature_info]
    return [
        Event(name, "map", OUT_OF, measure_batch(y, packed_map(count, y), group))
        for name, count, y in zip(names, counts, maps, strict=True)
        if count is not None
    ]


def _train(
    case: Case, module: nn.Module, x: Feature, before: Action, after: Action, settings: Settings
) -> dict[str, float]:
    """Relative errors of the output in training, which may take other paths through a layer than
    inference, and of gradients in the input and in parameters."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    count = len(as_parts(x))
    inputs = [f"the input, part {i}" for i in range(count)] if count > 1 else ["the input"]
    outputs, gradients = [], []
    module.train()
    for g in range(case.group.order):
        x_g = map_parts(lambda part: part.detach().requires_grad_(), before(g, x))
        torch.manual_seed(settings.seed)  # the same masks of stochastic depth for each element
        with settings.autocast():
            y = module(x_g)
        # linear, for a loss that saturates would amplify the rounding of the output
        generator = torch.Generator().manual_seed(1)
        random = [
            torch.randn(part.shape, generator=generator, dtype=torch.float64)
            for part in as_parts(y)
        ]
        weights = as_parts(after(g, tuple(random) if isinstance(y, tuple) else random[0]))
        found = torch.autograd.grad(
            as_parts(y),
            [*as_parts(x_g), *parameters.values()],
            [weight.to(part) for weight, part in zip(weights, as_parts(y), strict=True)],
            materialize_grads=True,
        )
        of_input = found[:count] if isinstance(x, tuple) else found[0]
        of_input = as_parts(before(case.group.inverse(g), of_input))
        outputs.append(y)
        gradients.append([*of_input, *found[count:]])
    module.eval()
    expected, *others = gradients
    errors = [gradient_errors(expected, found, FLOOR[case.is_network]) for found in others]
    of_gradients = zip([*inputs, *parameters], torch.stack(errors).amax(0).tolist(), strict=True)
    return {"the output in training": measure(outputs, after).error, **dict(of_gradients)}


def gradient_errors(expected: Sequence[Tensor], found: Sequence[Tensor], floor: float) -> Tensor:
    """Relative error of each gradient.

    A gradient much smaller than the others is what rounding leaves of terms that cancel, so no
    error is taken relative to less than `floor` times the largest norm. If all gradients vanish,
    the errors are NaN.
    """
    norms = torch.stack([each.double().norm() for each in expected])
    errors = [
        (other.double() - each.double()).norm() for each, other in zip(expected, found, strict=True)
    ]
    return torch.stack(errors) / norms.clamp(min=floor * norms.amax())
