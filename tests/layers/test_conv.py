"""Convolutions by mirror-symmetric and mirror-antisymmetric kernels."""

import pytest
import torch
import torch.nn.functional as F
from checks import Packed, breaks, check, close, features, few, random_layer
from hypothesis import given
from hypothesis import strategies as st

from deit.equivariance import channels, compose, image
from deit.groups import FLOP, Rep
from deit.layers import MirrorConv2d, MirrorDepthwiseConv2d, MirrorKernel

COLOURS = Rep(FLOP, free=0, fixed=3)


def on_maps(channels_: int):
    """Flopping of (B, H, W, C) with packed channels."""
    return compose(channels(FLOP.regular(channels_)), lambda g, x: x.flip(2) if g else x)


def last(*arguments: torch.Tensor) -> torch.Tensor:
    """Maps (B, c, H, W), one after another along the channels, with channels last."""
    return torch.cat(arguments, 1).permute(0, 2, 3, 1)


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
    kernel, _ = part()
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
    x = features(3, 2, width, 2 * n_in)
    check(Packed(layer), x, on_maps(2 * n_in), on_maps(2 * n_out))
    assert Packed(layer)(x).shape == (3, 2, count, 2 * n_out)


@few
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_equivariant_from_colours(n_out, patch, count):
    layer = MirrorConv2d(COLOURS, 2 * n_out, (2, patch), (2, patch))
    check(Packed(layer), features(2, 3, 4, count * patch), image(FLOP), on_maps(2 * n_out))


@few
@given(st.integers(1, 3), st.sampled_from([1, 3, 7]), st.integers(1, 6), st.booleans())
def test_depthwise_equivariant(n, k, width, bias):
    layer = MirrorDepthwiseConv2d(4 * n, k, bias)
    layer = Packed(layer, FLOP.regular(4 * n))
    check(layer, features(3, 3, width, 4 * n), on_maps(4 * n), on_maps(4 * n))


def test_downsampling_formula():
    """s' = ss * s + as * a + b and a' = sa * s + aa * a; sa and as have opposite columns."""
    layer = random_layer(MirrorConv2d(FLOP.regular(4), 6, (2, 2), (2, 2)))
    s, a = features(2, 4, 6, 4).chunk(2, 1)

    def conv(part, sign, x):
        return F.conv2d(x, mirrored(part.weight, sign, False), stride=2)

    bias = layer.sym_to_sym.bias[:, None, None]
    expected = last(
        conv(layer.sym_to_sym, 1, s) + conv(layer.asym_to_sym, -1, a) + bias,
        conv(layer.sym_to_asym, -1, s) + conv(layer.asym_to_asym, 1, a),
    )
    close(Packed(layer)(last(s, a)), expected)


def test_depthwise_formula():
    """The table: s' = (ss * s1, as * a1), a' = (sa * s2, aa * a2), biases on the two of s'."""
    layer = random_layer(MirrorDepthwiseConv2d(8))
    x = features(2, 8, 5, 6)
    s1, s2, a1, a2 = x.chunk(4, 1)

    def conv(part, sign, y):
        return F.conv2d(y, mirrored(part.weight, sign, True), part.bias, padding=3, groups=2)

    expected = last(
        conv(layer.sym_to_sym, 1, s1),
        conv(layer.asym_to_sym, -1, a1),
        conv(layer.sym_to_asym, -1, s2),
        conv(layer.asym_to_asym, 1, a2),
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


def test_broken_twins_are_found():
    x, action, rep = features(3, 5, 6, 8), on_maps(8), FLOP.regular(8)
    layer = random_layer(MirrorDepthwiseConv2d(8))
    # a kernel that is not mirrored
    part = layer.sym_to_sym
    part.forward = lambda: (features(2, 1, 7, 7, seed=1), part.bias)
    breaks(Packed(layer, rep), x, action, action)
    # the wrong sign of the mirror image
    layer = MirrorDepthwiseConv2d(8)
    layer.sym_to_asym = MirrorKernel(2, 1, (7, 7), sign=1)
    breaks(random_layer(Packed(layer, rep)), x, action, action)
    # a shift of a'
    layer = Packed(MirrorConv2d(rep, 8, (3, 3), padding=(1, 1)))
    check(layer, x, action, action)
    shift = torch.ones(8, dtype=torch.float64)
    breaks(lambda y: layer(y) + shift, x, action, action)


def test_a_width_that_breaks_equivariance_is_refused():
    layer = MirrorConv2d(FLOP.regular(4), 4, (2, 2), (2, 2))
    with pytest.raises(ValueError, match=r"over 7 columns, leaves out 1 .*use 6 or 8"):
        Packed(layer)(torch.zeros(1, 4, 7, 4))
    # with good reason: the same convolution without the check
    random_layer(layer)

    def unchecked(x):
        return last(F.conv2d(x.permute(0, 3, 1, 2), *layer.kernel(), 2))

    breaks(unchecked, features(2, 4, 7, 4), on_maps(4), on_maps(4))


def test_errors_name_the_rule():
    with pytest.raises(ValueError, match=r"6 channels.*multiple of 4"):
        MirrorDepthwiseConv2d(6)
    with pytest.raises(ValueError, match=r"size 4 has no centre.*odd"):
        MirrorDepthwiseConv2d(8, 4)
