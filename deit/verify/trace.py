"""Every feature inside a network, measured as it is computed, and the first layer to blame.

The network runs once, on a batch that holds the images and then the same images moved by each
element of the group. Hooks compare the pieces of what goes into and comes out of each layer, so
nothing has to be stored. Measurements come in the order of computation. The first that fails names
the culprit: the layer whose output is wrong, because its inputs held; or, if an input went bad
between layers, the module that was computing in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deit.equivariance import EquivarianceReport, Feature, as_parts, measure
from deit.groups import Group
from deit.layers import MirrorKernel
from deit.verify.rules import INTO, OUT_OF, Rule, Rules, is_feature

__all__ = ["Event", "Trace", "first_failure", "measure_batch", "together"]


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


def first_failure(events: Iterable[Event], tolerance: float) -> Event | None:
    """The event that names the culprit, or None if all hold."""
    return next((event for event in events if event.measurement.problem(tolerance)), None)


def together(features: list[Feature]) -> Feature:
    """One batch of several."""
    if isinstance(features[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*features, strict=True))
    return torch.cat(features)


def measure_batch(x: Feature, rule: Rule, group: Group) -> EquivarianceReport:
    """Compare what came out for the samples, and for the moved ones behind them in the batch."""
    if rule.constant:
        return measure(x, [(g, x) for g in range(1, group.order)], rule.act, constant=True)
    pieces = [part.chunk(group.order) for part in as_parts(x)]
    pieces = list(zip(*pieces, strict=True)) if isinstance(x, tuple) else pieces[0]
    return measure(pieces[0], list(enumerate(pieces))[1:], rule.act, rule.pieces)


class Trace:
    """Measures the features of `network` while it runs on a batch such as

    with Trace(network, rules) as trace:
        network(torch.cat([x, x.flip(-1)]))
    trace.events
    """

    def __init__(self, network: nn.Module, rules: Rules | None = None) -> None:
        self.rules = Rules(network) if rules is None else rules
        self.events: list[Event] = []
        self.seen: set[str] = set()  # names of the layers that something was promised of
        self._names = {module: name for name, module in network.named_modules()}
        self._running: list[str] = []
        self._measured: dict[tuple[int, ...], list[weakref.ref[Tensor]]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Trace:
        for module in self._names:
            self._handles += [
                module.register_forward_pre_hook(self._before),
                module.register_forward_hook(self._after),
            ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and is_feature(inputs[0]):
            self._compare(module, INTO, inputs[0])
        self._running.append(self._names[module])

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._running.pop()
        if isinstance(module, MirrorKernel):
            output, _ = output  # the rest is a bias
        if not is_feature(output):
            return
        passed_on = inputs and is_feature(inputs[0]) and _key(output) == _key(inputs[0])
        if not passed_on:  # as dropout passes on in inference
            self._compare(module, OUT_OF, output)

    def _compare(self, module: nn.Module, side: str, x: Feature) -> None:
        rule = self.rules.rule(module, side, x)
        if rule is None:
            return
        self.seen.add(self._names[module])
        # what comes out of one layer and goes into the next is measured once
        parts, key = as_parts(x), _key(x)
        known = zip(self._measured.get(key, [None] * len(key)), parts, strict=True)
        if side == INTO and all(ref and ref() is part for ref, part in known):
            return
        if rule.constant and not any(part.any() for part in parts):
            return  # zero is invariant, but has no relative error
        found = measure_batch(x, rule, self.rules.group)
        inside = self._running[-1] if self._running else ""
        kind = type(module).__name__
        self.events.append(Event(self._names[module], kind, side, found, inside))
        self._measured[key] = [weakref.ref(part) for part in parts]


def _key(x: Feature) -> tuple[int, ...]:
    return tuple(map(id, as_parts(x)))
