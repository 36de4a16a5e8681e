"""Convolutions by mirror-symmetric and mirror-antisymmetric kernels."""

import pytest
import torch
import torch.nn.functional as F
from checks import breaks, check, close, features, few, random_layer
from hypothesis import given
from hypothesis import strategies as st

from deit.equivariance import channels, compose, image
from deit.groups import FLOP, Rep
from deit.layers import (
    ChannelsLastMirrorConv2d,
    MirrorConv2d,
    MirrorDepthwiseConv2d,
    MirrorKernel,
)

COLOURS = Rep(FLOP, free=0, fixed=3)


def on_maps(channels_: int):
    """Flopping of (B, C, H, W) with packed channels."""
    return compose(channels(FLOP.regular(channels_), 1), image(FLOP))


def mirrored(left: torch.Tensor, sign: int, centre: bool) -> torch.Tensor:
    """A whole kernel, column by column."""
    columns = list(left.unbind(-1))
    if centre and sign > 0:
        right = columns[:-1]
    elif centre:
        right, columns = columns, [*columns, torch.zeros_like(columns[0])]
    else:
        right = columns
    return torch.stack([*columns, *(sign * column for column in reversed(right))], -1)


@pytest.mark.parametrize("width", [2, 3, 7, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_kernel_is_its_own_mirror_image(width, sign):
    part = random_layer(MirrorKernel(4, 2, (3, width), sign))
    kernel = part.kernel()
    assert kernel.shape == (4, 2, 3, width)
    assert torch.equal(kernel.flip(-1), sign * kernel)
    assert torch.equal(kernel[..., : width // 2], part.weight[..., : width // 2])
    close(kernel, mirrored(part.weight, sign, width % 2 == 1))


def test_stored_columns():
    """7 wide: four columns with the centre last if symmetric, three and a fixed zero if not."""
    shapes = {
        sign: {k: tuple(v.shape) for k, v in MirrorKernel(4, 1, (7, 7), sign).state_dict().items()}
        for sign in (1, -1)
    }
    assert shapes[1] == {"weight": (4, 1, 7, 4)}
    assert shapes[-1] == {"weight": (4, 1, 7, 3), "zero_center": (4, 1, 7, 1)}


def test_initial_scale_is_that_of_the_stored_half():
    """torch's default for Conv2d: uniform, up to the root of one over the fan-in."""
    torch.manual_seed(0)
    part = MirrorKernel(64, 3, (16, 16), 1, bias=True)
    bound = (3 * 16 * 8) ** -0.5
    for tensor in (part.weight, part.bias):
        assert 0.9 * bound < tensor.abs().max() <= bound


@few
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 1),
    st.integers(1, 4),
)
def test_equivariant_where_the_stride_leaves_nothing_out(n_in, n_out, k, stride, padding, count):
    width = (count - 1) * stride + k - 2 * padding
    if width < 1:
        return
    layer = MirrorConv2d(
        FLOP.regular(2 * n_in), 2 * n_out, (1, k), (1, stride), (0, padding), scale=0.5
    )
    x = features(3, 2 * n_in, 2, width)
    check(layer, x, on_maps(2 * n_in), on_maps(2 * n_out))
    assert layer(x).shape == (3, 2 * n_out, 2, count)


@few
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_equivariant_from_colours(n_out, patch, count):
    layer = MirrorConv2d(COLOURS, 2 * n_out, (2, patch), (2, patch))
    check(layer, features(2, 3, 4, count * patch), image(FLOP), on_maps(2 * n_out))


@few
@given(st.integers(1, 3), st.sampled_from([1, 3, 7]), st.integers(1, 6), st.booleans())
def test_depthwise_equivariant(n, k, width, bias):
    layer = MirrorDepthwiseConv2d(4 * n, k, bias)
    check(layer, features(3, 4 * n, 3, width), on_maps(4 * n), on_maps(4 * n))


def test_downsampling_formula():
    """s' = ss * s + as * a + b and a' = sa * s + aa * a; sa and as have opposite columns."""
    layer = random_layer(MirrorConv2d(FLOP.regular(4), 6, (2, 2), (2, 2)))
    s, a = features(2, 4, 6, 4).chunk(2, 1)

    def conv(part, sign, x):
        return F.conv2d(x, mirrored(part.weight, sign, False), stride=2)

    bias = layer.sym_to_sym.bias[:, None, None]
    expected = torch.cat(
        [
            conv(layer.sym_to_sym, 1, s) + conv(layer.asym_to_sym, -1, a) + bias,
            conv(layer.sym_to_asym, -1, s) + conv(layer.asym_to_asym, 1, a),
        ],
        1,
    )
    x = torch.cat([s, a], 1)
    close(layer(x), expected)
    last = ChannelsLastMirrorConv2d(FLOP.regular(4), 6, (2, 2), (2, 2)).double()
    last.load_state_dict(layer.state_dict())
    close(last(x.permute(0, 2, 3, 1)), expected.permute(0, 2, 3, 1))


def test_depthwise_formula():
    """The table: s' = (ss * s1, as * a1), a' = (sa * s2, aa * a2), biases on the two of s'."""
    layer = random_layer(MirrorDepthwiseConv2d(8))
    x = features(2, 8, 5, 6)
    s1, s2, a1, a2 = x.chunk(4, 1)

    def conv(part, sign, y):
        return F.conv2d(y, mirrored(part.weight, sign, True), part.bias, padding=3, groups=2)

    expected = torch.cat(
        [
            conv(layer.sym_to_sym, 1, s1),
            conv(layer.asym_to_sym, -1, a1),
            conv(layer.sym_to_asym, -1, s2),
            conv(layer.asym_to_asym, 1, a2),
        ],
        1,
    )
    close(layer(x), expected)
    assert [k for k in layer.state_dict() if k.endswith("bias")] == [
        "sym_to_sym.bias",
        "asym_to_sym.bias",
    ]


def test_channels_last_memory_is_kept():
    """Between layers that want channels last no copy is needed."""
    x = features(2, 8, 6, 6).float().to(memory_format=torch.channels_last)
    for layer in (MirrorDepthwiseConv2d(8), MirrorConv2d(FLOP.regular(8), 8, (2, 2), (2, 2))):
        assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_scale_is_a_factor_on_the_output():
    plain = random_layer(MirrorConv2d(COLOURS, 4, (2, 2), (2, 2)))
    scaled = MirrorConv2d(COLOURS, 4, (2, 2), (2, 2), scale=0.3).double()
    scaled.load_state_dict(plain.state_dict())
    x = features(2, 3, 4, 4)
    close(scaled(x), 0.3 * plain(x))


def test_broken_twins_are_found():
    x, action = features(3, 8, 5, 6), on_maps(8)
    layer = random_layer(MirrorDepthwiseConv2d(8))
    # a kernel that is not mirrored
    layer.sym_to_sym.kernel = lambda: features(2, 1, 7, 7, seed=1)
    breaks(layer, x, action, action)
    # the wrong sign of the mirror image
    layer = MirrorDepthwiseConv2d(8)
    layer.sym_to_asym = MirrorKernel(2, 1, (7, 7), sign=1)
    breaks(random_layer(layer), x, action, action)
    # a shift of a'
    layer = MirrorConv2d(FLOP.regular(8), 8, (3, 3), padding=(1, 1))
    check(layer, x, action, action)
    shift = torch.ones(8, 1, 1, dtype=torch.float64)
    breaks(lambda y: layer(y) + shift, x, action, action)


def test_a_width_that_breaks_equivariance_is_refused():
    layer = MirrorConv2d(FLOP.regular(4), 4, (2, 2), (2, 2))
    with pytest.raises(ValueError, match=r"over 7 columns, leaves out 1 .*use 6 or 8"):
        layer(torch.zeros(1, 4, 4, 7))
    # with good reason: the same convolution without the check
    random_layer(layer)
    action = on_maps(4)
    y = features(2, 4, 4, 7)
    breaks(lambda z: F.conv2d(z, layer.kernel(), layer.bias(), 2), y, action, action)


def test_errors_name_the_rule():
    with pytest.raises(ValueError, match=r"6 channels.*multiple of 4"):
        MirrorDepthwiseConv2d(6)
    with pytest.raises(ValueError, match=r"size 4 has no centre.*odd"):
        MirrorDepthwiseConv2d(8, 4)
