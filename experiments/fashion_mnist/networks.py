"""Small networks for 28 x 28 grey images, registered with timm: a network is a row of the grid."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import torch
from timm import create_model, is_model
from torch import nn

from deit.measure.flops import count_flops
from deit.models import (
    IsotropicConvNeXt,
    OrdinaryResMLP,
    OrdinaryVisionTransformer,
    ResMLP,
    VisionTransformer,
)
from deit.models.registry import register_sizes

Family = Literal["vit", "resmlp", "convnext"]
Kind = Literal["ordinary", "equivariant", "hybrid", "invariant_early"]

IMAGE_SIZE = 28
CHANNELS = 1
CLASSES = 10
HEAD_WIDTH = 32  # of a ViT whose width is `like`

BRIDGES = {"equivariant": None, "hybrid": "regular", "invariant_early": "invariant"}


@dataclass(frozen=True)
class Network:
    """A network of the study.

    Attributes:
        width: channels, of both irreps together.
        like: the width of the ordinary network that it is compared with, which decides the number
            of heads of a ViT.
    """

    family: Family
    kind: Kind
    width: int
    depth: int
    patch: int
    like: int

    @property
    def name(self) -> str:
        """What timm calls it."""
        size = f"w{self.width}_d{self.depth}_p{self.patch}"
        return f"fashion_{self.family}_{self.kind}_{size}"

    def register(self) -> None:
        """Make `timm.create_model(name)` know it; twice does no harm."""
        if is_model(self.name):
            return
        cls, arguments = self._class_and_arguments()
        register_sizes(
            __name__,
            cls,
            {
                self.name: {
                    "embed_dim": self.width,
                    "depth": self.depth,
                    "patch_size": self.patch,
                    "in_chans": CHANNELS,
                    **arguments,
                }
            },
            cfg={
                "input_size": (CHANNELS, IMAGE_SIZE, IMAGE_SIZE),
                "num_classes": CLASSES,
                "fixed_input_size": self.family != "convnext",
            },
        )

    def _class_and_arguments(self) -> tuple[type[nn.Module], dict[str, Any]]:
        ordinary = self.kind == "ordinary"
        if self.family == "convnext":
            return IsotropicConvNeXt, {"equivariant": not ordinary}
        if self.family == "resmlp":
            return (OrdinaryResMLP if ordinary else ResMLP), {}
        heads = {"num_heads": self.like // HEAD_WIDTH}
        if ordinary:
            return OrdinaryVisionTransformer, heads
        return VisionTransformer, heads | {"bridge": BRIDGES[self.kind]}

    def flops(self) -> float:
        """FLOPs of one image; a multiply-add is one."""
        self.register()
        with torch.device("meta"):
            model = create_model(
                self.name, **({} if self.family == "convnext" else {"img_size": IMAGE_SIZE})
            )
            image = torch.empty(1, CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
        return count_flops(model, image).total


def as_wide_as(family: Family, like: int) -> int:
    """The width at which an equivariant network has about the FLOPs of an ordinary one.

    A block-diagonal layer costs half, so the width grows by the root of 2, to the next width that
    the irreps, and the heads of a ViT, divide.
    """
    step = 2 * (like // HEAD_WIDTH) if family == "vit" else 4
    return step * round(sqrt(2) * like / step)
