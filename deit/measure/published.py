"""The published networks, their twins and their results; facts, not measurements of ours.

Accuracies are top-1 on ImageNet-1K at 224 x 224, read off the published figure (within 0.1).
Gains are in throughput over the ordinary twin on one A100 with 40 GB: mixed precision, compiled,
batch 64. Source: arXiv:2502.05169, section 5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["PUBLISHED", "Published", "twin_of"]

Kind = Literal["ordinary", "equivariant", "hybrid"]


@dataclass(frozen=True)
class Published:
    """A published network. `top1` in percent, `gain` as a fraction; None where none is given."""

    name: str
    family: str
    size: str
    kind: Kind
    top1: float | None = None
    gain: float | None = None


def _rows(
    family: str, size: str, names: dict[Kind, str], top1: tuple[float | None, ...], gain: float
) -> list[Published]:
    return [
        Published(name, family, size, kind, accuracy, gain if kind == "equivariant" else None)
        for (kind, name), accuracy in zip(names.items(), top1, strict=True)
    ]


def _vit(size: str) -> dict[Kind, str]:
    return {
        "ordinary": f"deit_{size}_LS",
        "equivariant": f"d2_deit_{size}_LS",
        "hybrid": f"hybrid_deit_{size}_LS",
    }


def _convnext(size: str) -> dict[Kind, str]:
    name = f"convnext_isotropic_{size}"
    return {"ordinary": name, "equivariant": f"d2_{name}"}


def _resmlp(ordinary: str, equivariant: str) -> dict[Kind, str]:
    return {"ordinary": f"resmlp{ordinary}", "equivariant": f"resmlp_equi_d2_{equivariant}"}


PUBLISHED = (
    *_rows("ViT", "S", _vit("small_patch16"), (None, None, None), -0.08),
    *_rows("ViT", "B", _vit("base_patch16"), (83.1, 82.2, 83.0), 0.06),
    *_rows("ViT", "L", _vit("large_patch16"), (84.2, 83.4, 84.5), 0.13),
    *_rows("ViT", "H", _vit("huge_patch14"), (84.6, 84.4, 85.0), 0.16),
    *_rows("ConvNeXt-iso", "S", _convnext("small"), (79.7, 76.8), -0.19),
    *_rows("ConvNeXt-iso", "B", _convnext("base"), (82.0, 81.3), 0.05),
    *_rows("ConvNeXt-iso", "L", _convnext("large"), (82.6, 82.6), 0.19),
    *_rows("ResMLP", "T12", _resmlp("_12", "12"), (76.6, 72.0), 0.08),
    *_rows("ResMLP", "S24", _resmlp("_24", "24"), (79.4, 74.9), 0.09),
    *_rows("ResMLP", "B24", _resmlp("B_24", "B_24"), (81.0, 80.8), 0.39),
    *_rows("ResMLP", "L24", _resmlp("L_24", "L_24"), (80.4, 81.5), 0.59),
)

# name of a network to the name of its ordinary twin
TWINS = (
    (r"(?:d2_|hybrid_|d2_inv_early_)deit_(\w+)", r"deit_\1"),
    (r"resmlp_equi_d2_(\d+)", r"resmlp_\1"),
    (r"resmlp_equi_d2_([A-Z]_\d+)", r"resmlp\1"),
    (r"d2_(convnext_\w+)", r"\1"),
)


def twin_of(name: str) -> str | None:
    """The ordinary network that one of ours is compared with; None for an ordinary network."""
    for pattern, twin in TWINS:
        if match := re.fullmatch(pattern, name):
            return match.expand(twin)
    return None
