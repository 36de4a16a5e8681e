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


@dataclass(frozen=True)
class Published:
    """A published network. `top1` in percent, `gain` as a fraction; None where none is given."""

    name: str
    family: str
    size: str
    kind: Literal["ordinary", "equivariant", "hybrid"]
    top1: float | None = None
    gain: float | None = None


PUBLISHED = (
    Published("deit_small_patch16_LS", "ViT", "S", "ordinary"),
    Published("d2_deit_small_patch16_LS", "ViT", "S", "equivariant", None, -0.08),
    Published("hybrid_deit_small_patch16_LS", "ViT", "S", "hybrid"),
    Published("deit_base_patch16_LS", "ViT", "B", "ordinary", 83.1),
    Published("d2_deit_base_patch16_LS", "ViT", "B", "equivariant", 82.2, 0.06),
    Published("hybrid_deit_base_patch16_LS", "ViT", "B", "hybrid", 83.0),
    Published("deit_large_patch16_LS", "ViT", "L", "ordinary", 84.2),
    Published("d2_deit_large_patch16_LS", "ViT", "L", "equivariant", 83.4, 0.13),
    Published("hybrid_deit_large_patch16_LS", "ViT", "L", "hybrid", 84.5),
    Published("deit_huge_patch14_LS", "ViT", "H", "ordinary", 84.6),
    Published("d2_deit_huge_patch14_LS", "ViT", "H", "equivariant", 84.4, 0.16),
    Published("hybrid_deit_huge_patch14_LS", "ViT", "H", "hybrid", 85.0),
    Published("convnext_isotropic_small", "ConvNeXt-iso", "S", "ordinary", 79.7),
    Published("d2_convnext_isotropic_small", "ConvNeXt-iso", "S", "equivariant", 76.8, -0.19),
    Published("convnext_isotropic_base", "ConvNeXt-iso", "B", "ordinary", 82.0),
    Published("d2_convnext_isotropic_base", "ConvNeXt-iso", "B", "equivariant", 81.3, 0.05),
    Published("convnext_isotropic_large", "ConvNeXt-iso", "L", "ordinary", 82.6),
    Published("d2_convnext_isotropic_large", "ConvNeXt-iso", "L", "equivariant", 82.6, 0.19),
    Published("resmlp_12", "ResMLP", "T12", "ordinary", 76.6),
    Published("resmlp_equi_d2_12", "ResMLP", "T12", "equivariant", 72.0, 0.08),
    Published("resmlp_24", "ResMLP", "S24", "ordinary", 79.4),
    Published("resmlp_equi_d2_24", "ResMLP", "S24", "equivariant", 74.9, 0.09),
    Published("resmlpB_24", "ResMLP", "B24", "ordinary", 81.0),
    Published("resmlp_equi_d2_B_24", "ResMLP", "B24", "equivariant", 80.8, 0.39),
    Published("resmlpL_24", "ResMLP", "L24", "ordinary", 80.4),
    Published("resmlp_equi_d2_L_24", "ResMLP", "L24", "equivariant", 81.5, 0.59),
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
