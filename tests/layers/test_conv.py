"""Convolutions by mirror-symmetric and mirror-antisymmetric kernels."""

import pytest
import torch
import torch.nn.functional as F
from checks import Packed, close, features, random_layer

from deit.groups import FLOP, Rep
from deit.layers import MirrorConv2d, MirrorDepthwiseConv2d, MirrorKernel

COLOURS = Rep(FLOP, free=0, fixed=3)


def last(*arguments: torch.Tensor) -> torch.Tensor:
    """Maps (B, c, H, W), one after another along the channels, with channels last."""
    return torch.cat(arguments, 1).permute(0, 2, 3, 1)


@pytest.mark.parametrize("width", [2, 3, 7, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_kernel_is_its_own_mirror_image(width, sign):
    part = random_layer(MirrorKernel(4, 2, (3, width), sign))
    kernel, _ = part()
    assert kernel.shape == (4, 2, 3, width)
    assert torch.equal(kernel.flip(-1), sign * kernel)
    assert torch.equal(kernel[..., : part.weight.shape[-1]], part.weight)


def test_stored_columns():
    """7 wide: four columns with the centre last if symmetric, three and a fixed zero if not."""
    shapes = {
        sign: {k: tuple(v.shape) for k, v in MirrorKernel(4, 1, (7, 7), sign).state_dict().items()}
        for sign in (1, -1)
    }
    assert shapes[1] == {"weight": (4, 1, 7, 4)}
    assert shapes[-1] == {"weight": (4, 1, 7, 3), "zero_center": (4, 1, 7, 1)}


def test_downsampling_formula():
    """s' = ss * s + as * a + b and a' = sa * s + aa * a; sa and as have opposite columns."""
    layer = random_layer(MirrorConv2d(FLOP.regular(4), 6, (2, 2), (2, 2)))
    s, a = features(2, 4, 6, 4).chunk(2, 1)

    def conv(part, x):
        return F.conv2d(x, part()[0], stride=2)

    bias = layer.sym_to_sym.bias[:, None, None]
    expected = last(
        conv(layer.sym_to_sym, s) + conv(layer.asym_to_sym, a) + bias,
        conv(layer.sym_to_asym, s) + conv(layer.asym_to_asym, a),
    )
    close(Packed(layer)(last(s, a)), expected)


def test_depthwise_formula():
    """The table: s' = (ss * s1, as * a1), a' = (sa * s2, aa * a2), biases on the two of s'."""
    layer = random_layer(MirrorDepthwiseConv2d(8))
    x = features(2, 8, 5, 6)
    s1, s2, a1, a2 = x.chunk(4, 1)

    def conv(part, y):
        return F.conv2d(y, *part(), padding=3, groups=2)

    expected = last(
        conv(layer.sym_to_sym, s1),
        conv(layer.asym_to_sym, a1),
        conv(layer.sym_to_asym, s2),
        conv(layer.asym_to_asym, a2),
    )
    close(Packed(layer, FLOP.regular(8))(last(x)), expected)
    assert [k for k in layer.state_dict() if k.endswith("bias")] == [
        "sym_to_sym.bias",
        "asym_to_sym.bias",
    ]


def test_channels_last_memory_is_kept():
    """Between layers that want channels last no copy is needed."""
    x = tuple(features(2, 6, 6, 4, seed=seed).float() for seed in range(2))
    for part in MirrorDepthwiseConv2d(8)(x):
        assert part.is_contiguous()


def test_scale_is_a_factor_on_the_output():
    plain = random_layer(MirrorConv2d(COLOURS, 4, (2, 2), (2, 2)))
    scaled = MirrorConv2d(COLOURS, 4, (2, 2), (2, 2), scale=0.3).double()
    scaled.load_state_dict(plain.state_dict())
    x = features(2, 3, 4, 4)
    close(Packed(scaled)(x), 0.3 * Packed(plain)(x))


def test_errors_name_the_rule():
    with pytest.raises(ValueError, match=r"6 channels.*multiple of 4"):
        MirrorDepthwiseConv2d(6)
    with pytest.raises(ValueError, match=r"size 4 has no centre.*odd"):
        MirrorDepthwiseConv2d(8, 4)
