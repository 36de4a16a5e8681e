"""The check of a whole network: every feature inside, the maps it hands out, logits, gradients.

What is promised depends on the network. Equivariant and invariant-early ones are invariant to the
end. A hybrid is equivariant up to and including its bridge, and nothing is promised of its logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import timm
import torch
from torch import Tensor, nn

import deit.models  # noqa: F401 - registers the networks
from deit import layers as L
from deit.complexity.published import twin_of
from deit.equivariance import randomize_
from deit.errors import UserError, one_line, suggest
from deit.groups import FLOP
from deit.verify import features, samples
from deit.verify.measure import Measurement, gradient_errors, is_far_off, measure, worst
from deit.verify.settings import Settings
from deit.verify.trace import MIRROR, Event, Trace

__all__ = ["DEFAULT", "NetworkCase", "NetworkResult", "check_network", "choose", "known_networks"]


@dataclass(frozen=True)
class NetworkCase:
    """A registered network, the arguments it is made with, and the image size, (height, width)."""

    name: str
    variant: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    img_size: tuple[int, int] = (224, 224)

    def __str__(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name

    def build(self) -> nn.Module:
        """The network with its initial parameters, on the CPU.

        Raises:
            UserError: if it cannot be built for these images.
        """
        try:
            return timm.create_model(self.name, img_size=self.img_size, **self.options)
        except ValueError as error:
            raise UserError(f"{self.name} cannot be built: {one_line(error)}") from error


# Gradients go through every layer twice, and some are small differences of large terms: they are
# compared relative to the largest of them, and may be off by so many tolerances. 16-bit gradients
# of a whole network differ by more than would be telling.
GRADIENT_FLOOR, GRADIENT_SLACK = 1.0, 128
BLOCKS = (L.Block, L.OrdinaryBlock, L.MixerBlock, L.ConvBlock)
SYMMETRIZED = {"use_symmetrized_asym_feats": True}
MIXER = {"use_attn_mixer": True}
REGISTERS = {"class_token": False, "reg_tokens": 2, "global_pool": "avg"}
ODD = (112, 112)  # a grid with a middle column, for patches of 16 pixels
# The smallest network of each family as it is used, and on small images with its options.
DEFAULT = (
    NetworkCase("d2_deit_tiny_patch16_LS"),
    NetworkCase(
        "d2_deit_tiny_patch16_LS", "mixer, symmetrized, odd", {**SYMMETRIZED, **MIXER}, ODD
    ),
    NetworkCase("d2_deit_tiny_patch16_LS", "registers, mean", REGISTERS, (64, 96)),
    NetworkCase("hybrid_deit_tiny_patch16_LS"),
    NetworkCase("hybrid_deit_tiny_patch16_LS", "mixer, odd", MIXER, ODD),
    NetworkCase("d2_inv_early_deit_tiny_patch16_LS"),
    NetworkCase("d2_inv_early_deit_tiny_patch16_LS", "mixer, odd", MIXER, ODD),
    NetworkCase("resmlp_equi_d2_12"),
    NetworkCase("resmlp_equi_d2_12", "symmetrized, odd", SYMMETRIZED, ODD),
    NetworkCase("d2_convnext_isotropic_small"),
    NetworkCase(
        "d2_convnext_isotropic_small",
        "LayerScale, symmetrized, odd",
        {**SYMMETRIZED, "layer_scale_init_value": 1e-6},
        ODD,
    ),
    NetworkCase("d2_convnext_tiny"),
    NetworkCase("d2_convnext_tiny", "symmetrized, not square", SYMMETRIZED, (64, 96)),
)


@dataclass(frozen=True)
class NetworkResult:
    """What was found.

    Attributes:
        events: measurements, in the order of computation; the last are of the maps and the logits.
        depth: number of blocks.
        natural, random: the largest errors of features on either kind of image.
        logits: the error of the logits, promised or not.
        fused: how far fused or compiled paths are from the plain formulas in the logits, relative.
        gradient: the largest error of a parameter's gradient; None where it is not compared.
        twin: the ordinary network's error in the logits, in float32.
    """

    case: NetworkCase
    settings: Settings
    depth: int
    invariant: bool
    events: list[Event]
    natural: float
    random: float
    logits: float
    fused: float
    gradient: float | None
    twin: float
    failures: list[str] = field(default_factory=list)

    @property
    def worst(self) -> Event:
        """The first event that fails, or else the one with the largest error."""
        return self.culprit or max(self.events, key=lambda event: event.measurement.error)

    @property
    def culprit(self) -> Event | None:
        """The first event that fails."""
        return first_failure(self.events, self.tolerance)

    @property
    def tolerance(self) -> float:
        return self.settings.tolerance(self.depth)

    @property
    def layers(self) -> int:
        """How many layers have been measured."""
        return len({event.layer for event in self.events})

    @property
    def contrast(self) -> float:
        return min(event.measurement.contrast for event in self.events)


def first_failure(events: list[Event], tolerance: float) -> Event | None:
    """The event that names the culprit, or None if all hold."""
    return next((event for event in events if event.measurement.problem(tolerance)), None)


def known_networks() -> list[str]:
    """All registered networks that promise something."""
    return [name for name in timm.list_models() if twin_of(name)]


def choose(patterns: list[str]) -> list[str]:
    """The networks that match names or globs, in the order of the patterns, each once.

    Raises:
        UserError: if a pattern matches none, or names an ordinary network.
    """
    known = known_networks()
    chosen: dict[str, None] = {}
    for pattern in patterns:
        matches = [name for name in known if fnmatchcase(name, pattern)]
        if not matches and timm.is_model(pattern):
            raise UserError(f"{pattern!r} is an ordinary network: nothing is promised of it")
        if not matches:
            raise UserError(f"no network matches {pattern!r}{suggest(pattern, known)}")
        chosen.update(dict.fromkeys(matches))
    return list(chosen)


def check_network(
    case: NetworkCase, settings: Settings, network: nn.Module | None = None
) -> NetworkResult:
    """Check one network with random parameters, or `network` as it is.

    The whole batch, first the images and then the same images flopped, goes through in one pass.
    """
    images = samples.images(settings.count, case.img_size, settings.seed)
    batch = torch.cat([images, images.flip(-1)]).to(settings.device, settings.dtype)
    if network is None:
        network = randomize_(case.build(), settings.seed)
    network = network.to(settings.device, settings.dtype).eval()

    with torch.no_grad():
        trace = Trace(network)
        with trace if not settings.compile else nullcontext(), settings.autocast():
            plain = network(batch)  # no hooks for compile: they cannot see into what it makes
        events = trace.events + _maps(network, batch, settings)
        with settings.autocast():
            logits = settings.compiled(network)(batch)
    result = _compare_logits(logits)
    fused = float((logits.double() - plain.double()).norm() / plain.double().norm())
    if trace.invariant:
        events.append(Event("", type(network).__name__, "out of", result, ""))
    gradient = None
    if trace.invariant and settings.compute_dtype not in (torch.bfloat16, torch.float16):
        gradient = _gradient_error(network, batch, settings)
    twin = _twin_error(
        twin_of(case.name),
        case.img_size,
        case.options.get("patch_size"),
        settings.count,
        settings.seed,
        settings.device,
    )
    errors = [e.measurement.errors for e in events if len(e.measurement.errors) > 1]
    found = NetworkResult(
        case,
        settings,
        sum(isinstance(module, BLOCKS) for module in network.modules()),
        trace.invariant,
        events,
        natural=worst(*(error for row in errors for error in row[: settings.count])),
        random=worst(*(error for row in errors for error in row[settings.count :])),
        logits=result.error,
        fused=fused,
        gradient=gradient,
        twin=twin,
    )
    found.failures.extend(_failures(found))
    if not settings.compile:
        found.failures.extend(_never_measured(network, found))
    return found


def _failures(result: NetworkResult) -> list[str]:
    tol = result.tolerance
    failures = []
    if culprit := result.culprit:
        failures.append(f"{culprit} ({culprit.kind}): {culprit.measurement.problem(tol)}")
    if result.gradient is not None and not result.gradient <= GRADIENT_SLACK * tol:
        limit = GRADIENT_SLACK * tol
        failures.append(f"gradients: error {result.gradient:.1e} > tolerance {limit:.1e}")
    if not result.fused <= tol:
        failures.append(f"fused paths change the logits: error {result.fused:.1e} > {tol:.1e}")
    if not is_far_off(result.twin, result.logits if result.invariant else 0.0, tol):
        failures.append(f"the ordinary twin is hardly worse (error {result.twin:.1e})")
    return failures


def _never_measured(network: nn.Module, result: NetworkResult) -> list[str]:
    """A block that no hook has seen has not been checked."""
    seen = {event.layer for event in result.events}
    kinds = BLOCKS if result.invariant else tuple(set(BLOCKS) - {L.OrdinaryBlock})
    return [
        f"{name} was never measured"
        for name, module in network.named_modules()
        if isinstance(module, kinds) and name not in seen
    ]


def _compare_logits(logits: Tensor) -> Measurement:
    first, second = logits.chunk(2)
    return measure(first, [(MIRROR, second)], features.in_rows(None))


def _maps(network: nn.Module, batch: Tensor, settings: Settings) -> list[Event]:
    """The maps that a network hands out are flipped, and half of their channels negated."""
    run = network.forward_intermediates
    with settings.autocast():
        maps = settings.compiled(run)(batch, intermediates_only=True)
    events = []
    for info, feature in zip(network.feature_info, maps, strict=True):
        channels, symmetric = info["num_chs"], info["symmetric_channels"]
        if symmetric is None:  # behind the bridge of a hybrid
            continue
        rep = FLOP.regular(channels) if symmetric < channels else None
        assert symmetric in (channels, channels // 2), info
        first, second = feature.chunk(2)
        measured = measure(first, [(MIRROR, second)], features.in_map(rep))
        events.append(Event(f"map of {info['module']}", "map", "out of", measured, ""))
    return events


def _gradient_error(network: nn.Module, batch: Tensor, settings: Settings) -> float:
    """The largest relative error of the gradients of a loss, in training mode.

    One natural and one random image, so that a large network's activations fit.
    """
    picked = batch.view(2, 2, settings.count, *batch.shape[1:])[:, :, 0]  # flopped, kind
    parameters = dict(network.named_parameters())
    network.train()
    gradients = []
    for images in picked:
        with settings.autocast():
            logits = network(images)
        # linear, for a loss that saturates would amplify the rounding of the logits
        generator = torch.Generator().manual_seed(settings.seed)
        weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        values = torch.autograd.grad(
            logits, list(parameters.values()), weights.to(logits), allow_unused=True
        )
        gradients.append(dict(zip(parameters, values, strict=True)))
    network.eval()
    return worst(*gradient_errors(*gradients, floor=GRADIENT_FLOOR).values())


@lru_cache(maxsize=64)
def _twin_error(
    name: str,
    img_size: tuple[int, int],
    patch_size: int | None,
    count: int,
    seed: int,
    device: torch.device,
) -> float:
    """The error in the logits of an ordinary network with random parameters, in float32."""
    images = samples.images(count, img_size, seed)
    batch = torch.cat([images, images.flip(-1)]).to(device, torch.float32)
    options: dict[str, Any] = {} if "convnext" in name else {"img_size": img_size}
    if patch_size is not None:
        options["patch_size"] = patch_size
    network = randomize_(timm.create_model(name, **options), seed).to(device).eval()
    with torch.no_grad():
        return _compare_logits(network(batch)).error
