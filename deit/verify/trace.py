"""Every feature inside a network, measured as it is computed, and the first layer to blame.

The network runs once, on a batch that holds the images and then the same images moved by each
element of the group. Hooks compare the pieces of what goes into and comes out of each layer, so
nothing has to be stored. Measurements come in the order of computation. The first that fails names
the culprit: the layer whose output is wrong, because its inputs held; or, if an input went bad
between layers, the module that was computing in between.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deit import layers as L
from deit.equivariance import EquivarianceReport, Feature, as_parts, measure
from deit.groups import Group
from deit.verify.rules import INTO, OUT_OF, Rule, Rules

BLOCKS = (L.Block, L.OrdinaryBlock, L.MixerBlock, L.ConvBlock)


@dataclass(frozen=True)
class Event:
    """A measurement of what went "into" or came "out of" a layer."""

    layer: str  # qualified name; "" for the network itself
    kind: str
    side: str
    measurement: EquivarianceReport
    inside: str = ""  # the module that was computing

    @property
    def culprit(self) -> str:
        """The module to blame if this is the first event that fails."""
        return self.inside if self.side == INTO else self.layer

    def __str__(self) -> str:
        name = self.layer or "the whole"
        return f"{self.inside or 'the whole'}, before {name}" if self.side == INTO else name


def measure_batch(x: Feature, rule: Rule, group: Group) -> EquivarianceReport:
    """Compare what came out for the samples, and for the moved ones behind them in the batch."""
    if rule.constant:
        return measure([x] * group.order, rule.act, constant=True)
    chunks = [part.chunk(group.order) for part in as_parts(x)]
    outputs = list(zip(*chunks, strict=True)) if isinstance(x, tuple) else chunks[0]
    return measure(outputs, rule.act, rule.pieces)


def trace(
    network: nn.Module, rules: Rules, batch: Feature
) -> tuple[Feature, list[Event], list[str]]:
    """Run a network on a batch such as `torch.cat([x, x.flip(-1)])`, and measure all within.

    Returns:
        The output; the measurements, in the order of computation; the names of the outermost
        layers with parameters that have seen no feature.
    """
    names = {module: name for name, module in network.named_modules()}
    unseen = {  # in order, as dictionaries are
        name: None
        for module, name in names.items()
        if isinstance(module, BLOCKS) or [*module.parameters(recurse=False)]
    }
    running: list[str] = []
    events: list[Event] = []
    last: tuple[Tensor, ...] = ()  # the parts that were measured last

    def compare(module: nn.Module, side: str, x: Any) -> None:
        nonlocal last
        parts = as_parts(x)
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            return
        unseen.pop(names[module], None)
        rule = rules.rule(module, side, x)
        # What comes out of one layer and goes into the next is measured once. Zero is invariant,
        # but has no relative error.
        if (
            rule is None
            or (side == INTO and _same(parts, last))
            or (rule.constant and not any(part.any() for part in parts))
        ):
            return
        found = measure_batch(x, rule, rules.group)
        inside = running[-1] if running else ""
        events.append(Event(names[module], type(module).__name__, side, found, inside))
        last = parts

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs:
            compare(module, INTO, inputs[0])
        running.append(names[module])

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        running.pop()
        if isinstance(module, L.MirrorKernel):
            output = output[0][None]  # without the bias
        # dropout passes on what it is given
        if not (inputs and _same(as_parts(inputs[0]), as_parts(output))):
            compare(module, OUT_OF, output)

    with ExitStack() as hooks:
        for module in names:
            hooks.callback(module.register_forward_pre_hook(before).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        output = network(batch)
    inside = tuple(f"{name}." for name in unseen)
    return output, events, [name for name in unseen if not name.startswith(inside)]


def _same(x: tuple[Any, ...], y: tuple[Any, ...]) -> bool:
    return len(x) == len(y) and all(p is q for p, q in zip(x, y, strict=True))
