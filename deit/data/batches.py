"""Whole batches, as a worker makes them: uint8 images, and what random erasing will put into them.

Random erasing acts on normalised images, and so on the device. timm's loader draws it there, image
by image, from the generators of the process. Here the worker draws it by timm's own code, under the
seed of the sample, and sends the pixels that change: on the device a batch takes one assignment.
The distribution is timm's; which part of which image is erased differs from a run of timm's, and is
the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from deit.data.images import ImageDataset
from deit.data.stream import Sample, preserve_generators, sample_seeds, seed_everything
from deit.errors import UserError


@dataclass
class RawBatch:
    """What a worker sends."""

    images: Tensor
    """uint8 (B, 3, H, W)"""
    targets: Tensor
    """int64 (B,)"""
    erased: Tensor | None = None
    """Which of the B H W pixels random erasing replaces: int64 (E,), each of them once."""
    noise: Tensor | None = None
    """What it puts there: float32 (E, 3), normalised values."""

    def pin_memory(self) -> RawBatch:
        """Called by the DataLoader's pinning thread."""
        tensors = (self.images, self.targets, self.erased, self.noise)
        return RawBatch(*(None if tensor is None else tensor.pin_memory() for tensor in tensors))


@dataclass
class WorkerError:
    """A UserError on its way out of a worker: raised there, its text would hold a traceback."""

    message: str


class BatchDataset(Dataset):
    """Makes whole batches (`DataLoader` hands `__getitems__` what the batch sampler yields).

    For training, items are `Sample`s and every image is made under its own seed; for evaluation
    they are indices. Positions that are multiples of `first_clean` are not erased (0: none).
    """

    def __init__(
        self,
        images: ImageDataset,
        seed: int | None = None,
        erasing: RandomErasing | None = None,
        first_clean: int = 0,
    ) -> None:
        self.images = images
        self.seed = seed
        self.erasing = erasing
        self.first_clean = first_clean

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, items: list[Sample] | list[int]) -> RawBatch | WorkerError:
        try:
            if self.seed is None:
                return self._collate([self.images[index] for index in items])
            with preserve_generators() if get_worker_info() is None else nullcontext():
                return self._seeded(items)
        except UserError as error:
            return WorkerError(str(error))

    def _seeded(self, items: list[Sample]) -> RawBatch:
        seeds = [sample_seeds(self.seed, item.epoch, item.position) for item in items]
        made = []
        for item, seed in zip(items, seeds, strict=True):
            seed_everything(seed.transform)
            made.append(self.images[item.index])
        batch = self._collate(made)
        if self.erasing is not None:
            clean = [self.first_clean and item.position % self.first_clean == 0 for item in items]
            drawn = [None if c else s.erasing for c, s in zip(clean, seeds, strict=True)]
            batch.erased, batch.noise = draw_erasing(self.erasing, batch.images.shape[1:], drawn)
        return batch

    def _collate(self, made: list[tuple[Tensor, int]]) -> RawBatch:
        return RawBatch(
            _stack([image for image, _ in made]),
            torch.tensor([target for _, target in made], dtype=torch.int64),
        )


def _stack(images: list[Tensor]) -> Tensor:
    """uint8 images (3, H, W) as one batch (B, 3, H, W), in shared memory if this is a worker.

    PIL's images are (H, W, 3) in memory. The batch keeps that layout, so that an image is copied in
    one run of bytes; the conversion to float on the device reorders it.
    """
    channels, height, width = images[0].shape
    out = torch.empty(0, dtype=torch.uint8)
    if get_worker_info() is not None:
        count = len(images) * channels * height * width
        out = out.new(out._typed_storage()._new_shared(count, device="cpu"))
    out = out.resize_(len(images), height, width, channels)
    for target, image in zip(out, images, strict=True):
        target.copy_(image.permute(1, 2, 0))
    return out.permute(0, 3, 1, 2)


def draw_erasing(
    erasing: RandomErasing, shape: Sequence[int], seeds: Sequence[int | None]
) -> tuple[Tensor, Tensor]:
    """`erased` and `noise` of a RawBatch of images of `shape` (3, H, W), one seed an image.

    An image without a seed stays whole.
    """
    area = shape[1] * shape[2]
    erased, noise = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, shape[0])]
    for number, seed in enumerate(seeds):
        if seed is not None:
            seed_everything(seed)
            canvas = erasing(torch.full(shape, torch.nan)).flatten(1)
            (pixels,) = torch.where(~canvas[0].isnan())
            erased.append(pixels + number * area)
            noise.append(canvas[:, pixels].T)
    return torch.cat(erased), torch.cat(noise)


def erase(images: Tensor, erased: Tensor, noise: Tensor) -> None:
    """Put `noise` into the pixels `erased` of normalised `images` (B, 3, H, W), in place."""
    area = images.shape[2] * images.shape[3]
    images.flatten(2)[erased // area, :, erased % area] = noise
