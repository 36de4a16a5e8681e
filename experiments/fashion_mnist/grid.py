"""What is trained: the plans (how long, on how much) and their grids of cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from experiments.fashion_mnist.networks import Family, Kind, Network, as_wide_as

SEEDS = (0, 1, 2)
FRACTIONS = (0.1, 0.3)  # of the training set, beside all of it


@dataclass(frozen=True)
class Plan:
    """One recipe, the same for every network, and the sizes of the networks.

    Every cell makes the same number of updates, whatever the fraction of the training set: fewer
    images are seen more often. So data efficiency is not mistaken for a shorter training.

    Attributes:
        widths: of the ordinary networks, and of their twins.
        legs: the training is as many equal legs; the test set is looked at after each.
        updates: optimizer updates in a leg.
        warmup: in legs.
        shift: pixels that training images are moved by at most.
    """

    name: str
    patch: int
    depth: int
    widths: tuple[int, ...]
    legs: int
    updates: int
    batch_size: int
    lr: float
    weight_decay: float = 0.05
    warmup: float = 0.0
    smoothing: float = 0.1
    layer_scale: float = 0.1
    clip_grad: float = 1.0
    shift: int = 0


@dataclass(frozen=True)
class Cell:
    """One training."""

    network: Network
    flip: bool
    """Whether training images are mirrored at random."""
    fraction: float
    """Of the training set; which images is drawn with the seed."""
    seed: int

    @property
    def name(self) -> str:
        """Its file name."""
        flip = "flip" if self.flip else "noflip"
        network = self.network.name.removeprefix("fashion_")
        return f"{network}-{flip}-{round(100 * self.fraction)}pct-seed{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a result file."""
        return asdict(self.network) | {
            "network": self.network.name,
            "flip": self.flip,
            "fraction": self.fraction,
            "seed": self.seed,
        }


QUICK = Plan(
    "quick", patch=7, depth=4, widths=(64, 96), legs=3, updates=220, batch_size=64, lr=2e-3,
    warmup=0.25,
)  # fmt: skip
FULL = Plan(
    "full", patch=4, depth=8, widths=(96, 192, 384), legs=30, updates=468, batch_size=128, lr=1e-3,
    warmup=2.0, shift=2,
)  # fmt: skip

TWINS: tuple[tuple[Family, Kind], ...] = tuple(
    product(("vit", "resmlp", "convnext"), ("ordinary", "equivariant"))
)
BRIDGED: tuple[tuple[Family, Kind], ...] = (("vit", "hybrid"), ("vit", "invariant_early"))


def cells(plan: Plan) -> list[Cell]:
    """The grid of a plan; the seeds are the outermost loop, so that a grid that was stopped early
    has all networks at fewer seeds."""
    build = _quick if plan.name == "quick" else _full
    firsts = list(dict.fromkeys(build(plan)))
    return [replace(cell, seed=seed) for seed in SEEDS for cell in firsts]


def _network(plan: Plan, family: Family, kind: Kind, width: int) -> Network:
    return Network(family, kind, width, plan.depth, plan.patch, like=width)


def _at_equal_flops(plan: Plan, family: Family, like: int) -> Network:
    width = as_wide_as(family, like)
    return Network(family, "equivariant", width, plan.depth, plan.patch, like=like)


def _deeper(plan: Plan, like: int) -> Network:
    return Network("vit", "equivariant", like, 2 * plan.depth, plan.patch, like=like)


def _quick(plan: Plan) -> Iterator[Cell]:
    """What tells most in half an hour on two cores: augmentation and fractions for ViTs alone."""
    *_, largest = plan.widths
    for width, (family, kind) in product(plan.widths, TWINS):
        yield Cell(_network(plan, family, kind, width), True, 1.0, 0)
    for family in ("vit", "resmlp", "convnext"):
        yield Cell(_at_equal_flops(plan, family, largest), True, 1.0, 0)
    for family, kind in BRIDGED:
        yield Cell(_network(plan, family, kind, largest), True, 1.0, 0)
    for kind in ("ordinary", "equivariant"):
        network = _network(plan, "vit", kind, largest)
        yield Cell(network, False, 1.0, 0)
        for fraction in FRACTIONS:
            yield Cell(network, True, fraction, 0)


def _full(plan: Plan) -> Iterator[Cell]:
    for width, (family, kind), flip in product(plan.widths, TWINS + BRIDGED, (True, False)):
        yield Cell(_network(plan, family, kind, width), flip, 1.0, 0)
    for width in plan.widths:
        for family in ("vit", "resmlp", "convnext"):
            yield Cell(_at_equal_flops(plan, family, width), True, 1.0, 0)
        yield Cell(_deeper(plan, width), True, 1.0, 0)
    middle = plan.widths[len(plan.widths) // 2]
    for (family, kind), fraction in product(TWINS + BRIDGED, FRACTIONS):
        yield Cell(_network(plan, family, kind, middle), True, fraction, 0)
