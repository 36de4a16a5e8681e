"""Networks folded for deployment: the same function in standard layers and operations.

    from deit.deploy import fold
    folded = fold(model)                   # for PyTorch
    folded = fold(model, target="onnx")    # to be exported for ONNX Runtime

The structure that training needs (irreps, shared halves of kernels, scales and shifts between
layers) is folded into the weights of ordinary linear layers and convolutions, exactly: in float64
the outputs agree to 1e-9. What is left needs no code of this package when exported, and fewer
operations. Folded networks are for inference. Train the original.
"""

from __future__ import annotations

import copy
from typing import get_args

import torch
from torch import nn

from deit.deploy.convnext import FoldedConvNeXt
from deit.deploy.pair import Target
from deit.deploy.resmlp import FoldedResMLP
from deit.deploy.vit import FoldedVisionTransformer
from deit.errors import UserError
from deit.models import ConvNeXt, IsotropicConvNeXt, ResMLP, VisionTransformer

__all__ = ["fold"]


@torch.no_grad()
def fold(model: nn.Module, target: Target = "torch") -> nn.Module:
    """A new module that computes what `model` does in evaluation mode, in fewer operations.

    Args:
        model: a network of this package. Ordinary networks and modules are copied as they are. Of
            a module that contains equivariant networks, those are folded. It is left untouched.
        target: the runtime whose fastest form is chosen, "torch" or "onnx". Both forms run
            everywhere and give the same results.

    Returns:
        the folded network, on the device and in the dtype of `model`, in evaluation mode. It takes
        images and gives what `model` gives. It has none of its other methods, and no gradients.

    Raises:
        UserError: for another target, or if layers of `model` were replaced by what is not linear.
    """
    if target not in get_args(Target):
        raise UserError(f"target {target!r} is not known: use {' or '.join(get_args(Target))}")
    # of a compiled network the one behind it; in a list, so that the whole is one of its modules
    outer = nn.ModuleList([getattr(model, "_orig_mod", model)])
    found = {}
    for name, module in outer.named_modules():
        if (folded := _fold_network(module, target)) is not None:
            found[name] = (module, folded)
    # copies share what is replaced in a moment, so that its weights are not copied first
    copied = copy.deepcopy(outer, {id(module): module for module, _ in found.values()})
    for name, (_, folded) in found.items():
        copied.set_submodule(name, folded)
    return copied[0].eval()


def _fold_network(model: nn.Module, target: Target) -> nn.Module | None:
    """The folded form of one of our equivariant networks; None for anything else."""
    if isinstance(model, VisionTransformer):
        folded = FoldedVisionTransformer(model, target)
    elif isinstance(model, ResMLP):
        folded = FoldedResMLP(model, target)
    elif isinstance(model, (IsotropicConvNeXt, ConvNeXt)) and model.equivariant:
        folded = FoldedConvNeXt(model, target)
    else:
        return None
    parameter = next(model.parameters())
    return folded.to(parameter.device, parameter.dtype).requires_grad_(False)
