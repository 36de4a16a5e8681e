"""The published networks: their results, their twins, and the names of their weights.

Facts, not measurements of ours. Accuracies are top-1 on ImageNet-1K at 224 x 224, read off the
published figure (within 0.1). Gains are in throughput over the ordinary twin on one A100 with
40 GB: mixed precision, compiled, batch 64. Source: arXiv:2502.05169, section 5.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from timm.models.convnext import ConvNeXt
from torch import Tensor, nn


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


# Equivariant networks, ViTs and ResMLPs have the published names and shapes. Ordinary ConvNeXts do
# not: their published LayerScale is (1, C, 1, 1), products may be (out, in, 1, 1), and the
# hierarchical ones, which are timm's here, have names of their own.

# From the names of ConvNeXt's authors to timm's; the first that fits is taken.
_CONVNEXT = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
    (r"^stages\.(\d+)\.(\d+)\.pwconv(\d)\.", r"stages.\1.blocks.\2.mlp.fc\3."),
    (r"^stages\.(\d+)\.(\d+)\.(gamma$|norm\.)", r"stages.\1.blocks.\2.\3"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def own_name(model: nn.Module, name: str) -> str:
    """The name that `model` has for a published tensor; `name` itself if it has no other."""
    if isinstance(model, ConvNeXt):
        for pattern, replacement in _CONVNEXT:
            renamed, found = re.subn(pattern, replacement, name)
            if found:
                return renamed
    return name


def adapt_state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The published `state` as `model` has it; timm's order of arguments for such functions.

    Tensors that differ from the model's by axes of length 1 alone are given its shape; whatever
    else does not fit passes through.
    """
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    adapted = {}
    for key, value in state.items():
        name = own_name(model, key)
        shape = shapes.get(name, value.shape)
        same = same_but_for_ones(value.shape, shape)
        adapted[name] = value.reshape(shape) if same else value
    return adapted


def same_but_for_ones(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes differ by axes of length 1 at most."""
    return [n for n in one if n != 1] == [n for n in other if n != 1]
