"""The network that a checkpoint holds, built with the arguments that its weights need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from timm.layers import to_2tuple
from torch import Tensor, nn

from deit.checkpoint import load_model, model_state, read_checkpoint, trained_model_name
from deit.errors import UserError, one_line
from deit.layers import MirrorGrid
from deit.verify.networks import NetworkCase, choose

__all__ = ["network_of"]

TOKEN_ORDER = "patch_embed.flatten_and_permute.permutation"
# where the families keep their patch kernels, (C/2, 3, patch, half a patch)
PATCHES = ("patch_embed.proj_sym.weight", "stem.proj_sym.weight",
           "downsample_layers.0.0.proj_sym.weight")  # fmt: skip


def network_of(
    source: str, name: str | None = None, img_size: int | None = None
) -> tuple[NetworkCase, nn.Module]:
    """Build the network of a checkpoint and load it.

    Args:
        name: the model; None for the one that the checkpoint says it was trained as.
        img_size: for other images than it was trained on, if the network can take them.

    Raises:
        UserError: if the file cannot be read, its weights do not fit, or the model is unknown.
    """
    checkpoint = read_checkpoint(source)
    state = model_state(checkpoint, source=source)
    trained_as = trained_model_name(checkpoint)
    if name is None and trained_as is None:
        raise UserError(f"{source!r} does not say which model it is: give --model")
    (name,) = choose([name or trained_as])
    options = _options(state, name)
    own_size = _trained_size(checkpoint, state, name)
    case = NetworkCase(name, "checkpoint", options, own_size)
    network = case.build()
    if "head.weight" in state and network.head.in_features != state["head.weight"].shape[1]:
        options["use_symmetrized_asym_feats"] = True
        network = case.build()
    load_model(network, state, source=source, trained_as=trained_as)
    size = own_size if img_size is None else to_2tuple(img_size)
    if size != own_size and hasattr(network, "set_input_size"):
        try:
            network.set_input_size(size)
        except ValueError as error:
            raise UserError(f"--img-size {img_size}: {one_line(error)}") from error
    return NetworkCase(name, "checkpoint", options, size), network


def _options(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """What the keys and shapes say of the arguments."""
    options: dict[str, Any] = {"num_classes": 0}
    if "head.weight" in state:
        options["num_classes"] = state["head.weight"].shape[0]
    for key in PATCHES:
        if key in state:
            options["patch_size"] = state[key].shape[-2]
    if any(key.endswith("attn.attn_mixer") for key in state):
        options["use_attn_mixer"] = True
    if "convnext" in name:
        scaled = any(".gamma.alpha" in key for key in state)
        options["layer_scale_init_value"] = 1e-6 if scaled else 0.0
    return options


def _trained_size(
    checkpoint: Mapping[str, Any], state: Mapping[str, Tensor], name: str
) -> tuple[int, int]:
    """Height and width of the images that the weights are for."""
    size = getattr(checkpoint.get("args"), "input_size", None)
    if size is not None:
        return to_2tuple(size)
    if TOKEN_ORDER in state:
        grid = MirrorGrid.from_permutation(state[TOKEN_ORDER])
        patch = state[PATCHES[0]].shape[-2]
        return (grid.height * patch, grid.width * patch)
    return to_2tuple(timm.get_pretrained_cfg(name).input_size[-2:])
