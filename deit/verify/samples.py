"""What to check with: natural images from the bundled sample, random ones, features from both."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from deit.data import build_dataset

CANDIDATES = 256  # natural images are chosen among so many
WIDTH = 32  # of features
COARSE = (3, 4)  # height and width of the coarse noise; it should not look the same when flopped


@lru_cache(maxsize=1)
def _natural() -> Tensor:
    """(CANDIDATES, 3, H, W) in float64, normalised, those that flopping changes most first.

    Mirror-symmetric images, of which a sample of clothes has many, would show little.
    """
    dataset = build_dataset("val", name="SAMPLE")
    pixels = torch.from_numpy(np.stack([np.array(dataset[i][0]) for i in range(CANDIDATES)]))
    mean, std = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], dtype=torch.float64)
    batch = ((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    asymmetry = (batch - batch.flip(-1)).flatten(1).norm(dim=1) / batch.flatten(1).norm(dim=1)
    return batch[asymmetry.argsort(descending=True)]


def images(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """`count` natural images, then `count` random ones: (2 count, 3, H, W), float64, CPU."""
    natural = F.interpolate(_natural()[:count], size, mode="bicubic", antialias=True)
    return _with_random(natural, seed)


def features(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """`count` maps projected from natural images, then `count` random ones.

    Returns (2 count, H, W, WIDTH) in float64 on the CPU; entries have about unit variance.
    """
    natural = F.pixel_unshuffle(images(count, (2 * size[0], 2 * size[1]))[:count], 2)
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(WIDTH, natural.shape[1], generator=generator, dtype=torch.float64)
    natural = torch.einsum("oc,bchw->bohw", projection, natural)
    return _with_random(natural / natural.std(), seed).permute(0, 2, 3, 1)


def _with_random(natural: Tensor, seed: int) -> Tensor:
    """Natural samples, then as many of white noise on coarse noise: white noise alone looks much
    the same wherever it is pooled."""
    generator = torch.Generator().manual_seed(seed)
    fine = torch.randn(natural.shape, generator=generator, dtype=torch.float64)
    coarse = torch.randn((*natural.shape[:2], *COARSE), generator=generator, dtype=torch.float64)
    noise = fine + F.interpolate(coarse, natural.shape[-2:], mode="nearest")
    return torch.cat([natural, noise])
