"""The network that a checkpoint holds, as a case to check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import to_2tuple
from torch import nn

from deit.train.build import model_arguments
from deit.train.checkpoint import read_checkpoint
from deit.train.loading import build_as_trained
from deit.verify.networks import NetworkCase, choose

__all__ = ["network_of"]


def network_of(
    source: str,
    name: str | None = None,
    img_size: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[NetworkCase, nn.Module]:
    """Build the network of a checkpoint and load its trained weights (not their average).

    Args:
        name: the model; None for the one that the checkpoint says it was trained as.
        img_size: for other images than it was trained on, if the network can take them.
        kwargs: arguments of the network in place of those that it was trained with.

    Raises:
        UserError: if the file cannot be read, its weights do not fit, or the model is unknown.
    """
    if name is not None:
        (name,) = choose([name])
    checkpoint = read_checkpoint(source)
    network, args = build_as_trained(checkpoint, model=name, img_size=img_size, kwargs=kwargs)
    choose([args.model])
    options = model_arguments(args, network.num_classes)
    del options["img_size"]
    return NetworkCase(args.model, "checkpoint", options, to_2tuple(args.input_size)), network
