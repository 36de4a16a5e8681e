"""What to check with: natural images from the bundled sample, random ones, features from both."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from deit.data import build_dataset

__all__ = ["CANDIDATES", "features", "images"]

# natural images are chosen among so many
CANDIDATES = 256
COARSE = (3, 4)  # height and width of the coarse noise; it should not look the same when flopped


@lru_cache(maxsize=1)
def _natural() -> Tensor:
    """(CANDIDATES, 3, H, W) in float64, normalised, those that flopping changes most first.

    Mirror-symmetric images, of which a sample of clothes has many, would show little.
    """
    dataset = build_dataset("val", name="SAMPLE")
    pixels = torch.stack(
        [torch.from_numpy(np.array(dataset[i][0])).permute(2, 0, 1) for i in range(CANDIDATES)]
    )
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    batch = (pixels.double() / 255 - mean) / std
    asymmetry = (batch - batch.flip(-1)).flatten(1).norm(dim=1) / batch.flatten(1).norm(dim=1)
    return batch[asymmetry.argsort(descending=True)]


def images(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """`count` natural images, then `count` random ones: (2 count, 3, H, W), float64, CPU."""
    natural = F.interpolate(_natural()[:count], size, mode="bicubic", antialias=True)
    return torch.cat([natural, _random(natural.shape, seed)])


def _random(shape: torch.Size, seed: int) -> Tensor:
    """White noise on coarse noise: white noise alone looks much the same wherever it is pooled."""
    generator = torch.Generator().manual_seed(seed)
    fine = torch.randn(shape, generator=generator, dtype=torch.float64)
    coarse = torch.randn((*shape[:2], *COARSE), generator=generator, dtype=torch.float64)
    return fine + F.interpolate(coarse, shape[-2:], mode="nearest")


def features(count: int, size: tuple[int, int], width: int, seed: int = 0) -> Tensor:
    """`count` maps projected from natural images, then `count` random ones.

    Returns (2 count, width, H, W) in float64 on the CPU; entries have about unit variance.
    """
    natural = F.interpolate(
        _natural()[:count], (2 * size[0], 2 * size[1]), mode="bicubic", antialias=True
    )
    natural = F.pixel_unshuffle(natural, 2)
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(width, natural.shape[1], generator=generator, dtype=torch.float64)
    natural = torch.einsum("oc,bchw->bohw", projection, natural)
    natural = natural / natural.std()
    return torch.cat([natural, _random(natural.shape, seed)])
