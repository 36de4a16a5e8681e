"""Fashion-MNIST in the memory of a device, and batches of it without any worker.

Images of 28 x 28 bytes are too small for the loader of the package, which decodes and transforms
them one by one. Here a batch is one gather: its pixel coordinates carry crop and flip.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from deit.data import ResumableBatchSampler, build_dataset
from deit.data.datasets import DEBIAN_FASHION_MNIST, find_idx_pair, read_idx
from deit.data.stream import sample_seeds
from deit.errors import UserError

MEAN, STD = 0.2860, 0.3530  # of the training images, over 255


def find_data(path: str) -> Path:
    """The folder of the four idx files: `path`, or Debian's package.

    What is not in `path` yet is downloaded by torchvision.

    Raises:
        UserError: there is neither, or the download fails.
    """
    if not path:
        try:
            return _complete(DEBIAN_FASHION_MNIST)
        except UserError as error:
            raise UserError(
                "Fashion-MNIST is not installed (Debian's package dataset-fashion-mnist): name a "
                "folder by --data-path, it will be downloaded there"
            ) from error
    folder = Path(path)
    try:
        return _complete(folder)
    except UserError:
        build_dataset("train", name="FASHION", root=folder, download=True)
    return _complete(folder)


def _complete(folder: Path) -> Path:
    """`folder`, if both splits are in it; UserError otherwise."""
    for split in ("train", "val"):
        find_idx_pair(folder, split)
    return folder


class Images:
    """One split on a device: `pixels` uint8 (N, 28, 28), `targets` int64 (N,)."""

    def __init__(self, pixels: Tensor, targets: Tensor) -> None:
        self.pixels = pixels
        self.targets = targets

    @classmethod
    def load(cls, folder: Path, split: str, device: torch.device) -> Images:
        """From the idx files; UserError if they are damaged."""
        pixels, targets = (
            torch.from_numpy(read_idx(p).copy()) for p in find_idx_pair(folder, split)
        )
        return cls(pixels.to(device), targets.long().to(device))

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, fraction: float, seed: int) -> Images:
        """A random part of the images, another one for another seed; all of them for 1."""
        if fraction == 1:
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        chosen = order[: round(fraction * len(self))].to(self.targets.device)
        return Images(self.pixels[chosen], self.targets[chosen])

    def mirrored(self) -> Images:
        """All images mirrored left to right."""
        return Images(self.pixels.flip(-1), self.targets)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W) to float32 (B, 1, H, W)."""
    return pixels.float().sub_(255 * MEAN).div_(255 * STD).unsqueeze(1)


class TestBatches:
    """All images in order, as `deit.train.engine.evaluate` wants them."""

    __test__ = False  # no test of pytest's

    def __init__(self, images: Images, batch_size: int) -> None:
        self.images = images
        self.batch_size = batch_size

    def __len__(self) -> int:
        return ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = zip(
            self.images.pixels.split(self.batch_size),
            self.images.targets.split(self.batch_size),
            strict=True,
        )
        for pixels, targets in parts:
            yield normalised(pixels), targets


def training_batches(
    images: Images, *, batch_size: int, seed: int, flip: bool, shift: int, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches from number `start` on: float32 (B, 1, H, W) and targets (B,).

    Order, crops and flips of a batch depend on the seed and its number alone, so that a training
    that is resumed sees what it would have seen. Networks of one seed see the same batches, flipped
    or not.
    """
    stream = ResumableBatchSampler(len(images), batch_size=batch_size, epochs=0, seed=seed)
    device = images.targets.device
    number, order, known = start, torch.empty(0), -1
    while True:
        epoch, step = divmod(number, stream.steps_per_epoch)
        if epoch != known:
            order, known = torch.from_numpy(stream.permutation(epoch)), epoch
        chosen = order[step * batch_size : (step + 1) * batch_size].to(device)
        generator = torch.Generator().manual_seed(sample_seeds(seed, epoch, step).transform)
        yield augmented(images.pixels[chosen], flip, shift, generator), images.targets[chosen]
        number += 1


def augmented(pixels: Tensor, flip: bool, shift: int, generator: torch.Generator) -> Tensor:
    """Each image moved by at most `shift` pixels either way, and with `flip` mirrored or not.

    uint8 (B, H, W) to normalised float32 (B, 1, H, W).
    """
    count, height, width = pixels.shape
    corner = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
    mirror = torch.rand(count, 1, generator=generator) < 0.5  # drawn in any case: see above
    rows = corner[0] + torch.arange(height)
    columns = corner[1] + torch.arange(width)
    if flip:
        columns = torch.where(mirror, columns.flip(1), columns)
    rows, columns = rows.to(pixels.device), columns.to(pixels.device)
    padded = torch.nn.functional.pad(pixels, [shift] * 4)
    which = torch.arange(count, device=pixels.device)
    return normalised(padded[which[:, None, None], rows[:, :, None], columns[:, None, :]])
