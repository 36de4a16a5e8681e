"""From a PIL image to a uint8 tensor (3, H, W): training and evaluation transforms.

Everything that timm's `create_transform` does is left to it. What it lacks is here: ThreeAugment
(DeiT III, Touvron et al. 2022, arXiv:2204.07118), the simple random crop (`--src`), and a crop that
suits images of 32 pixels. Values become floats and are normalised on the device, by the loader, so
that workers send a quarter of the bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import auto_augment as timm_augment
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torchvision import transforms as tv

from deit.errors import UserError

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box")
SMALL = 32  # images of at most so many pixels a side: a crop of 8 % of the area would show nothing
CROP_PADDING = 4

Transform = Callable[[Image.Image], torch.Tensor]


def gaussian_blur(image: Image.Image) -> Image.Image:
    """`image` blurred with a random radius of 0.1 to 2 pixels (PIL's Gaussian approximation)."""
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def build_three_augment() -> tv.RandomChoice:
    """ThreeAugment: grayscale, solarize or Gaussian blur, one of them, equally likely."""
    grayscale = tv.Grayscale(num_output_channels=3)
    return tv.RandomChoice([grayscale, tv.RandomSolarize(threshold=128, p=1.0), gaussian_blur])


def train_transform(
    input_size: int,
    *,
    color_jitter: float | None = 0.3,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    three_augment: bool = False,
    simple_crop: bool = False,
    hflip: float = 0.5,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
) -> Transform:
    """The random training transform, from an RGB PIL image to a uint8 tensor (3, S, S).

    The crop is a random resized crop (8 to 100 % of the area). `simple_crop` (`--src`) makes it a
    resize and a random crop with 4 pixels of reflection padding. Without `three_augment`, inputs of
    at most 32 pixels get a resize and a random crop with 4 pixels of zero padding, as in DeiT. Then
    comes a flip with probability `hflip` (0 switches it off).

    `three_augment` takes the place of `auto_augment` (a RandAugment, AutoAugment or AugMix string
    of timm's; empty or None for none) and is followed by colour jitter. As in timm, `auto_augment`
    switches colour jitter off. `interpolation` may also be `random` (bilinear or bicubic, drawn per
    image). `mean` fills the borders that geometric augmentations leave.

    Raises UserError for an unknown interpolation or augmentation string.
    """
    _check_interpolation(interpolation, (*INTERPOLATIONS, "random"))
    try:
        geometry, colour, end = create_transform(
            input_size,
            is_training=True,
            hflip=hflip,
            color_jitter=color_jitter or None,
            auto_augment=None if three_augment else auto_augment or None,
            interpolation=interpolation,
            mean=tuple(mean),
            normalize=False,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"augmentation {auto_augment!r} is not understood; a valid one is rand-m9-mstd0.5-inc1"
        ) from error
    crop, *flip = geometry.transforms
    assert isinstance(crop, RandomResizedCropAndInterpolation), crop
    crops = [crop]
    if simple_crop or (input_size <= SMALL and not three_augment):
        # a resize to the very size of the output has no use for a random interpolation
        mode = str_to_interp_mode("bicubic" if interpolation == "random" else interpolation)
        padding = "reflect" if simple_crop else "constant"
        crops = [
            tv.Resize(input_size, interpolation=mode),
            tv.RandomCrop(input_size, padding=CROP_PADDING, padding_mode=padding),
        ]
    for step in colour.transforms:
        _repair_posterize(step)
    three = [build_three_augment()] if three_augment else []
    return tv.Compose([*crops, *flip, *three, *colour.transforms, *end.transforms])


def eval_transform(
    input_size: int,
    *,
    crop_ratio: float = 1.0,
    warp: bool = False,
    interpolation: str = "bicubic",
) -> Transform:
    """Resize the shorter side to int(S / crop_ratio), cut the S x S centre: uint8 (3, S, S).

    With `warp` the whole image is resized to S x S instead, whatever its shape.
    """
    _check_interpolation(interpolation, INTERPOLATIONS)
    if not 0 < crop_ratio <= 1:
        raise UserError(f"the crop ratio for evaluation is in (0, 1], not {crop_ratio}")
    return create_transform(
        input_size,
        is_training=False,
        crop_pct=1.0 if warp else crop_ratio,
        crop_mode="squash" if warp else "center",
        interpolation=interpolation,
        normalize=False,
    )


def _posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """timm's operation with black for zero bits: older Pillows gave that, Pillow 13 refuses.

    `rand-m9-mstd0.5-inc1` comes to zero bits whenever the noise takes its magnitude to 10.
    """
    if bits_to_keep >= 8:
        return image
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits_to_keep)


def _repair_posterize(step: Callable) -> None:
    """Put `_posterize` into the operations of one of timm's augmentations, in place."""
    policies = getattr(step, "policy", [getattr(step, "ops", [])])
    for operation in (operation for policy in policies for operation in policy):
        if operation.aug_fn is timm_augment.posterize:
            operation.aug_fn = _posterize


def _check_interpolation(interpolation: str, known: Sequence[str]) -> None:
    if interpolation not in known:
        raise UserError(f"unknown interpolation {interpolation!r}: one of {', '.join(known)}")
