"""Convolutions by mirror-symmetric and mirror-antisymmetric kernels."""

import pytest
import torch
from checks import features, random_layer

from deit.layers import MirrorDepthwiseConv2d, MirrorKernel


@pytest.mark.parametrize("width", [2, 3, 7, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_kernel_is_its_own_mirror_image(width, sign):
    part = random_layer(MirrorKernel(4, 2, (3, width), sign))
    kernel, _ = part()
    assert kernel.shape == (4, 2, 3, width)
    assert torch.equal(kernel.flip(-1), sign * kernel)
    assert torch.equal(kernel[..., : part.weight.shape[-1]], part.weight)


def test_channels_last_memory_is_kept():
    """Between layers that want channels last no copy is needed."""
    x = tuple(features(2, 6, 6, 4, seed=seed).float() for seed in range(2))
    for part in MirrorDepthwiseConv2d(8)(x):
        assert part.is_contiguous()
