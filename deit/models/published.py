"""Weights of the published networks under the names and in the shapes that ours have.

Equivariant networks, ViTs and ResMLPs have the published ones. Ordinary ConvNeXts do not: their
published LayerScale is (1, C, 1, 1), products may be (out, in, 1, 1), and the hierarchical ones,
which are timm's here, have names of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

__all__ = ["adapt_state", "own_name"]

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
        same = [n for n in shape if n != 1] == [n for n in value.shape if n != 1]
        adapted[name] = value.reshape(shape) if same else value
    return adapted
