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
from deit.deploy.pair import Folded, Target
from deit.deploy.resmlp import FoldedResMLP
from deit.deploy.vit import FoldedVisionTransformer
from deit.errors import UserError, one_line
from deit.models import ConvNeXt, IsotropicConvNeXt, ResMLP, VisionTransformer

__all__ = ["fold"]

_FORMS: dict[type[nn.Module], type[Folded]] = {
    VisionTransformer: FoldedVisionTransformer,
    ResMLP: FoldedResMLP,
    IsotropicConvNeXt: FoldedConvNeXt,
    ConvNeXt: FoldedConvNeXt,
}


@torch.no_grad()
def fold(model: nn.Module, target: Target = "torch") -> nn.Module:
    """A new module that computes what `model` does in evaluation mode, in fewer operations.

    Args:
        model: a network of this package, or a module that contains some, which is left untouched.
            Equivariant networks are folded wherever they stand. Everything else, subclasses too, is
            copied as it is. Forward hooks on what is folded, and whatever stands in place of a
            dropout, are not carried over.
        target: the runtime whose fastest form is chosen, "torch" or "onnx". Both forms run
            everywhere and give the same results.

    Returns:
        the folded network, on the device and in the dtype of `model`, in evaluation mode. It takes
        images and gives what `model` gives. It has none of its other methods, and no gradients.

    Raises:
        UserError: for another target, or if layers of `model` were replaced. Only `nn.Linear`s may
            be, by what is linear, and the head.
    """
    if target not in get_args(Target):
        raise UserError(f"target {target!r} is not known: use {' or '.join(get_args(Target))}")
    model = getattr(model, "_orig_mod", model)  # of a compiled network the one behind it
    found = ((module, _fold_network(module, target)) for module in model.modules())
    # a copy takes what is folded already for the copy of its original, wherever that stands
    folded = {id(module): folded for module, folded in found if folded is not None}
    return copy.deepcopy(model, folded).eval()


def _fold_network(model: nn.Module, target: Target) -> nn.Module | None:
    """The folded form of one of our equivariant networks; None for anything else."""
    form = _FORMS.get(type(model))  # a subclass may compute something else
    if form is None or (form is FoldedConvNeXt and not model.equivariant):
        return None
    try:
        folded = form(model, target)
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"{type(model).__name__} cannot be folded, because one of its layers was replaced: "
            f"{one_line(error)}"
        ) from error
    parameter = next(model.parameters())
    return folded.to(parameter.device, parameter.dtype).requires_grad_(False)
