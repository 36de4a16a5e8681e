"""Every feature inside a network, measured as it is computed, and the first layer to blame.

The network runs once, on a batch that holds the images and then the same images flopped. Hooks
compare the two halves of what goes into and comes out of each layer, so nothing has to be stored.
Measurements come in the order of computation. The first that fails names the culprit: the layer
whose output is wrong, because its inputs held; or, if an input went bad between layers, the module
that was computing in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Mlp as OrdinaryMlp
from timm.models.vision_transformer import Attention as OrdinaryAttention
from torch import Tensor, nn

from deit import layers
from deit.groups import FLOP, Rep
from deit.verify import features
from deit.verify.measure import Feature, Measurement, measure

__all__ = ["ON_LAST_AXIS", "ON_MAPS", "ORDINARY", "Event", "Trace"]

MIRROR = 1  # the element of FLOP that is not the identity

Reps = Callable[[Any], tuple[Rep, Rep]]
# Layers that act on the last axis: the representations of their input and their output.
ON_LAST_AXIS: dict[type[nn.Module], Reps] = {
    layers.Linear: lambda m: (m.in_rep, m.out_rep),
    layers.Affine: lambda m: (m.rep, m.rep),
    layers.LayerNorm: lambda m: (m.rep, m.rep),
    layers.GELU: lambda m: (m.rep, m.rep),
    layers.Mlp: lambda m: (m.fc1.in_rep, m.fc2.out_rep),
    layers.Attention: lambda m: (m.rep, m.rep),
    layers.Block: lambda m: (m.norm1.rep, m.norm1.rep),
    layers.MixerBlock: lambda m: (m.norm1.rep, m.norm1.rep),
    layers.ConvBlock: lambda m: (m.norm.rep, m.norm.rep),
    layers.ChannelsLastMirrorConv2d: lambda m: (m.in_rep, m.out_rep),
}
# The same for layers that take channels first.
ON_MAPS: dict[type[nn.Module], Reps] = {
    layers.MirrorConv2d: lambda m: (m.in_rep, m.out_rep),
    layers.MirrorDepthwiseConv2d: lambda m: (FLOP.regular(m.channels),) * 2,
}
# Ordinary layers: a network that is invariant to its end uses them on invariant features alone.
ORDINARY = (
    nn.Linear,
    nn.LayerNorm,
    layers.OrdinaryAffine,
    layers.OrdinaryBlock,
    OrdinaryAttention,
    OrdinaryMlp,
)


@dataclass(frozen=True)
class Event:
    """A measurement: of what went "into" a layer, came "out of" it, or of a "value" it holds."""

    layer: str  # qualified name; "" for the network itself
    kind: str
    side: str
    measurement: Measurement
    inside: str  # the module that was computing

    @property
    def culprit(self) -> str:
        """The module to blame if this is the first event that fails."""
        return self.inside if self.side == "into" else self.layer

    def __str__(self) -> str:
        name = self.layer or "the network"
        if self.side == "into":
            return f"{self.inside or 'the network'}, before {name}"
        return name


class Trace:
    """Measures the features of `network` while it runs on [images, flopped images].

        with Trace(network) as trace:
            network(torch.cat([x, x.flip(-1)]))
        trace.events

    Behind a bridge to the regular basis nothing is promised, and nothing measured. The plain
    formulas run: fused paths give no account of what is in between.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.events: list[Event] = []
        self._names = {module: name for name, module in network.named_modules()}
        self._running: list[str] = []
        self._measured: dict[int, weakref.ref] = {}
        self._undo: list[Callable[[], None]] = []
        self.invariant = not any(isinstance(m, layers.RegularBridge) for m in self._names)
        # What flopping does to tokens inside: ResMLP decomposes them, the others exchange them.
        self._prefix = getattr(network, "num_prefix_tokens", 0)
        self._place: features.MirroredTokens | Rep | None = getattr(network, "tokens", None)

    def __enter__(self) -> Trace:
        for module in self._names:
            for handle in (
                module.register_forward_pre_hook(self._before),
                module.register_forward_hook(self._after),
            ):
                self._undo.append(handle.remove)
            # Layers are also used by other doors than `forward`, which no hook sees.
            if isinstance(module, (layers.Linear, layers.GELU)):
                self._wrap(module, "map", self._mapped)
            elif isinstance(module, layers.Affine):
                self._wrap(module, "offset", self._shifted)
            elif isinstance(module, layers.PositionEmbedding):
                self._wrap(module, "packed", self._placed)
        return self

    def __exit__(self, *exception: object) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _wrap(self, module: nn.Module, method: str, watch: Callable) -> None:
        """Have `watch(module, original, *args)` called in place of a method of this instance."""
        original = getattr(module, method)
        own = method in module.__dict__

        def watched(*args: Any, **kwargs: Any) -> Any:
            return watch(module, original, *args, **kwargs)

        def undo() -> None:
            if own:
                setattr(module, method, original)
            else:
                delattr(module, method)

        setattr(module, method, watched)
        self._undo.append(undo)

    # what is called while the network runs

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module is self.network and getattr(module, "patch_embed", None) is not None:
            self._locate_tokens(inputs[0])
        if inputs and isinstance(inputs[0], Tensor):
            self._compare(module, "into", inputs[0])
        self._running.append(self._names[module])

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._running.pop()
        if isinstance(output, Tensor):
            self._compare(module, "out of", output)

    def _mapped(self, module: nn.Module, original: Callable, parts: Sequence[Tensor], **gains: Any):
        """A layer that takes and gives the irreps' blocks one by one."""
        self._compare(module, "into", torch.cat(list(parts), -1))
        outputs = original(parts, **gains)
        self._compare(module, "out of", torch.cat(outputs, -1))
        return outputs

    def _shifted(self, module: layers.Affine, original: Callable) -> Tensor | None:
        """The shift must be invariant by itself."""
        shift = original()
        if shift is not None:
            rows = shift if module.across else shift[None]
            self._constant(module, rows[None], features.in_rows(module.rep, module.across))
        return shift

    def _placed(self, module: layers.PositionEmbedding, original: Callable, *args: Any) -> Tensor:
        """A position embedding must be invariant: its mirror image is itself."""
        value = original(*args)
        self._constant(
            module, value, features.in_rows(FLOP.regular(value.shape[-1]), self._patches)
        )
        return value

    def _constant(self, module: nn.Module, value: Tensor, feature: Feature) -> None:
        if value.any():  # zero is invariant, but has no relative error
            feature = Feature(feature.act, constant=True)
            self._record(module, "value", measure(value, [(MIRROR, value)], feature))

    def _compare(self, module: nn.Module, side: str, x: Tensor) -> None:
        # what comes out of one layer and goes into the next is measured once
        reference = self._measured.get(id(x))
        if side == "into" and reference is not None and reference() is x:
            return
        feature = self._feature(module, x, 0 if side == "into" else 1)
        if feature is None:
            return
        first, second = x.chunk(2)
        self._record(module, side, measure(first, [(MIRROR, second)], feature))
        self._measured[id(x)] = weakref.ref(x)

    def _record(self, module: nn.Module, side: str, measurement: Measurement) -> None:
        inside = self._running[-1] if self._running else ""
        kind = type(module).__name__
        self.events.append(Event(self._names[module], kind, side, measurement, inside))

    # how features transform

    def _locate_tokens(self, images: Tensor) -> None:
        grid = self.network.patch_embed.grid_for(images.shape[-2], images.shape[-1])
        self._patches = features.MirroredTokens(grid.height, grid.width)
        if not isinstance(self._place, Rep):
            self._place = features.MirroredTokens(grid.height, grid.width, self._prefix)

    def _feature(self, module: nn.Module, x: Tensor, side: int) -> Feature | None:
        """How the input (side 0) or the output (side 1) transforms; None if nothing is promised."""
        if module is self.network:
            if side == 0:
                return features.picture()
            return features.in_rows(None) if self.invariant else None
        if isinstance(module, layers.PrefixToken):
            return features.nowhere(FLOP.regular(x.shape[-1]))
        if isinstance(module, layers.PatchEmbed):
            return (features.picture(), features.in_rows(module.out_rep, self._patches))[side]
        if isinstance(module, layers.RegularBridge):
            return (self._in_rows(module.rep, x), features.regular_tokens(self._place))[side]
        if isinstance(module, layers.InvariantBridge):
            return self._in_rows((module.rep, None)[side], x)
        if isinstance(module, ORDINARY):
            return self._in_rows(None, x) if self.invariant else None
        for cls in type(module).__mro__:
            if cls in ON_MAPS:
                return features.in_map(ON_MAPS[cls](module)[side])
            if cls in ON_LAST_AXIS:
                rep = ON_LAST_AXIS[cls](module)[side]
                across = getattr(module, "across", None)
                return self._in_rows(rep, x) if across is None else features.in_rows(rep, across)
        return None

    def _in_rows(self, rep: Rep | None, x: Tensor) -> Feature:
        if x.ndim == 4:
            return features.in_columns(rep)
        if x.ndim == 2 or x.shape[1] <= self._prefix:  # pooled, or the class token alone
            return features.in_rows(rep)
        if rep is None and isinstance(self._place, Rep):  # invariant parts of decomposed tokens
            return features.in_rows(None)
        return features.in_rows(rep, self._place)
