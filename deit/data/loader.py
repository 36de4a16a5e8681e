"""Loaders: workers make uint8 batches, the device turns them into normalised floats.

A training loader is ONE stream over all epochs: workers start once, and the first batches of an
epoch are under way while the last ones of the epoch before are trained on. Every sample is seeded
by its position (`deit.data.stream`), so that 0, 2 or 20 workers give the same bits. No global
random state of the main process is touched.

Random erasing acts on normalised images, and so on the device. timm's loader draws it there, image
by image, from the generators of the process. Here the worker draws it by timm's own code, under the
seed of the sample, and sends the pixels that change: on the device a batch takes one assignment.
The distribution is timm's; which part of which image is erased differs from a run of timm's, and is
the same on every device.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from deit.data.images import ImageDataset
from deit.data.stream import (
    ResumableBatchSampler,
    Sample,
    preserve_generators,
    sample_seeds,
    seed_everything,
)
from deit.data.workers import end_workers, start_pass, worker_death
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
            if self._erases(item):
                seed_everything(seeds.erasing)
                canvas = self.erasing(torch.full(made[-1][0].shape, torch.nan)).flatten(1)
                (pixels,) = torch.where(~canvas[0].isnan())
                erased.append(pixels + number * canvas.shape[1])
                noise.append(canvas[:, pixels].T)
        batch = _collate(made)
        if self.erasing is None:
            return batch
        return batch._replace(erased=torch.cat(erased), noise=torch.cat(noise))

    def _erases(self, item: Sample) -> bool:
        if self.erasing is None:
            return False
        splits = self.erasing.num_splits
        return splits <= 1 or item.position % splits > 0


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


class DeviceLoader:
    """Yields (images float32 (B, 3, H, W) normalised, targets int64 (B,)), both on `device`.

    On CUDA the next batch is copied and normalised on a side stream while the current one is in
    use, as in timm's PrefetchLoader. Workers live from the first pass until `close`, or until a
    pass fails. A damaged image fails it by a UserError that names the image.

    Args:
        batches: for training a `ResumableBatchSampler`, all whose epochs are one pass; for
            evaluation the indices of each batch, of `evaluation_batches`.
        erasing: timm's, with device="cpu". With `num_splits` it spares the first of so many copies
            that repeated augmentation makes of each image.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batches: ResumableBatchSampler | Sequence[Sequence[int]],
        *,
        device: torch.device | str,
        num_workers: int = 0,
        pin_memory: bool = True,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        erasing: RandomErasing | None = None,
    ) -> None:
        self.device = torch.device(device)
        on_cuda = self.device.type == "cuda"
        self._batches = DataLoader(
            BatchDataset(dataset, getattr(batches, "seed", None), erasing),
            sampler=batches,
            batch_size=None,  # the data set makes batches
            num_workers=num_workers,
            pin_memory=pin_memory and on_cuda,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # by default it draws its seed from the global one
        )
        self._compute = self.device if on_cuda else torch.device("cpu")
        self._mean, self._std = (
            torch.tensor([255 * value for value in values], device=self._compute).view(1, -1, 1, 1)
            for values in (mean, std)
        )
        self._stream = torch.cuda.Stream(self.device) if on_cuda else None
        # registered after torch's own, it runs at exit while workers can still be asked to end
        atexit.register(weakref.finalize(self, end_workers, self._batches))

    def __len__(self) -> int:
        """The number of batches of one pass."""
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self._finish, self._raw()) if self._stream is None else self._ahead_on_cuda()

    def close(self) -> None:
        """End the workers, and so the pass under way, if any."""
        end_workers(self._batches)

    def _raw(self) -> Iterator[RawBatch]:
        try:
            for batch in start_pass(self._batches):
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except Exception as error:
            death = worker_death(error)
            self.close()
            if death is not None:
                raise death from error
            raise

    def _ahead_on_cuda(self) -> Iterator[tuple[Tensor, Tensor]]:
        ready = None
        for batch in self._raw():
            # memory that the consumer freed may be reused below: wait for the work queued on it
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                coming = self._finish(batch)
            if ready is not None:
                yield ready
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            ready = coming
        if ready is not None:
            yield ready

    def _finish(self, batch: RawBatch) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self._compute, non_blocking=True)
        images = images.to(torch.float32, memory_format=torch.contiguous_format)
        images = images.sub_(self._mean).div_(self._std)
        if batch.erased is not None:
            parts = (batch.erased, batch.noise)
            erase(images, *(part.to(self._compute, non_blocking=True) for part in parts))
        targets = batch.targets.to(self.device, non_blocking=True)
        return images.to(self.device), targets
