"""Whole batches, as a worker makes them: uint8 images, and what random erasing will put into them.

Random erasing acts on normalised images, and so on the device. timm's loader draws it there, image
by image, from the generators of the process. Here the worker draws it by timm's own code, under the
seed of the sample, and sends the pixels that change: on the device a batch takes one assignment.
The distribution is timm's; which part of which image is erased differs from a run of timm's, and is
the same on every device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from deit.data.images import ImageDataset
from deit.data.stream import Sample, preserve_generators, sample_seeds, seed_everything
from deit.errors import UserError


class RawBatch(NamedTuple):
    """What a worker sends."""

    images: Tensor
    """uint8 (B, 3, H, W)"""
    targets: Tensor
    """int64 (B,)"""
    erased: Tensor | None = None
    """Which of the B H W pixels random erasing replaces: int64 (E,), each of them once."""
    noise: Tensor | None = None
    """What it puts there: float32 (E, 3), normalised values."""


class BatchDataset(Dataset):
    """Makes whole batches: it is indexed by the images of one.

    These are `Sample`s for training with the `seed` of a run, where every image is made under a
    seed of its own, or indices for evaluation. `erasing` spares samples at multiples of its
    `num_splits` if those are more than one, as it would the first split of a batch.
    """

    def __init__(
        self, images: ImageDataset, seed: int | None = None, erasing: RandomErasing | None = None
    ) -> None:
        self.images = images
        self.seed = seed
        self.erasing = erasing

    def __getitem__(self, items: list[Sample] | list[int]) -> RawBatch | UserError:
        try:
            if self.seed is None:
                return _collate([self.images[index] for index in items])
            with preserve_generators():
                return self._seeded(items)
        except UserError as error:  # raised in a worker, its text would hold a traceback
            return error

    def _seeded(self, items: list[Sample]) -> RawBatch:
        made, erased, noise = [], [torch.empty(0, dtype=torch.int64)], [torch.empty(0, 3)]
        for number, item in enumerate(items):
            seeds = sample_seeds(self.seed, item.epoch, item.position)
            seed_everything(seeds.transform)
            made.append(self.images[item.index])
            if self.erasing is None:
                continue
            splits = self.erasing.num_splits
            if splits > 1 and item.position % splits == 0:
                continue
            seed_everything(seeds.erasing)
            canvas = self.erasing(torch.full(made[-1][0].shape, torch.nan)).flatten(1)
            (pixels,) = torch.where(~canvas[0].isnan())
            erased.append(pixels + number * canvas.shape[1])
            noise.append(canvas[:, pixels].T)
        batch = _collate(made)
        if self.erasing is None:
            return batch
        return batch._replace(erased=torch.cat(erased), noise=torch.cat(noise))


def _collate(made: list[tuple[Tensor, int]]) -> RawBatch:
    """uint8 images (3, H, W) with their targets, in shared memory if this is a worker.

    PIL's images are (H, W, 3) in memory. The batch keeps that layout, so that an image is copied in
    one run of bytes; the conversion to float on the device reorders it.
    """
    channels, height, width = made[0][0].shape
    out = torch.empty(0, dtype=torch.uint8)
    if get_worker_info() is not None:
        count = len(made) * channels * height * width
        out = out.new(out._typed_storage()._new_shared(count, device="cpu"))
    out = out.resize_(len(made), height, width, channels)
    for target, (image, _) in zip(out, made, strict=True):
        target.copy_(image.permute(1, 2, 0))
    targets = torch.tensor([target for _, target in made], dtype=torch.int64)
    return RawBatch(out.permute(0, 3, 1, 2), targets)


def erase(images: Tensor, erased: Tensor, noise: Tensor) -> None:
    """Put `noise` into the pixels `erased` of normalised `images` (B, 3, H, W), in place."""
    area = images.shape[2] * images.shape[3]
    images.flatten(2)[erased // area, :, erased % area] = noise
