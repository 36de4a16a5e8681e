"""What an exported file says of its network: how to prepare images, what the outputs stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from deit.data.transforms import Transform, eval_transform

__all__ = ["NetworkInfo"]


@dataclass(frozen=True)
class NetworkInfo:
    """Kept in a file's metadata, each field as JSON under its own name.

    Attributes:
        model: the network's name.
        input_size: (height, width) of the images, in pixels.
        mean, std: of the three colours, of values in [0, 1].
        normalized: whether the file expects images from which `mean` is subtracted and that are
            divided by `std`. If not, it takes values in [0, 1] and does so itself.
        crop_ratio: side of the central crop, relative to the resized image's.
        warp: whether the whole image is resized instead, whatever its shape.
        interpolation: of the resize.
        class_names: what the outputs stand for, in their order; None if that is not known.
    """

    model: str
    input_size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    normalized: bool = True
    crop_ratio: float = 1.0
    warp: bool = False
    interpolation: str = "bicubic"
    class_names: tuple[str, ...] | None = None

    def transform(self) -> Transform:
        """From an RGB image to the uint8 pixels (3, H, W) of `input_size`."""
        return eval_transform(
            self.input_size,
            crop_ratio=self.crop_ratio,
            warp=self.warp,
            interpolation=self.interpolation,
        )

    def prepare(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) from 0 to 255 as the file takes them, float32."""
        images = pixels.float() / 255
        if not self.normalized:
            return images
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    def to_metadata(self) -> dict[str, str]:
        """Names to JSON texts."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}

    @classmethod
    def from_metadata(cls, texts: Mapping[str, str]) -> NetworkInfo:
        """The reverse; raises ValueError or TypeError if something is missing or no JSON."""
        known = {f.name for f in fields(cls)}
        values = {name: json.loads(text) for name, text in texts.items() if name in known}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**values)
