"""Perceptrons and whole blocks, equivariant and ordinary."""

import pytest
import torch
import torch.nn.functional as F
from checks import BOTH_GROUPS, Packed, breaks, check, close, features, few, parts, random_layer
from hypothesis import given
from hypothesis import strategies as st
from timm.models.convnext import ConvNeXtBlock as TimmConvBlock
from timm.models.mlp_mixer import ResBlock as TimmMixerBlock
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from deit.equivariance import channels, compose, tokens
from deit.groups import FLOP, Rep
from deit.layers import (
    Block,
    ConvBlock,
    MirrorGrid,
    MixerBlock,
    Mlp,
    OrdinaryAffine,
    OrdinaryBlock,
    OrdinaryConvBlock,
    OrdinaryMixerBlock,
    quick_gelu,
)

EIGHT = FLOP.regular(8)
PIXELS = compose(channels(EIGHT), lambda g, x: x.flip(2) if g else x)  # (B, H, W, C)


@BOTH_GROUPS
@few
@given(st.integers(1, 3), st.integers(1, 3))
def test_mlp_equivariant(group, n, ratio):
    layer = Packed(Mlp(8 * n, 8 * n * ratio, group=group), group.regular(8 * n))
    action = channels(group.regular(8 * n))
    check(layer, features(3, 5, 8 * n), action, action, group)


@pytest.mark.parametrize("act", [F.gelu, quick_gelu])
def test_mlp_formula(act):
    layer = random_layer(Mlp(6, 8, act=act))
    x = features(2, 3, 6)
    fc1, fc2 = Packed(layer.fc1), Packed(layer.fc2)
    hidden = FLOP.regular(8).to_regular(fc1(x))
    expected = fc2(FLOP.regular(8).from_regular(act(hidden)))
    close(Packed(layer, fc1.rep)(x), expected)


def test_mlp_dropout_acts_in_training_alone():
    layer, x = Packed(Mlp(8, 16, drop=0.5), FLOP.regular(8)), features(2, 8).float()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@BOTH_GROUPS
@pytest.mark.parametrize("mixer", [False, True])
def test_block_equivariant(group, mixer):
    rep = group.regular(16)
    layer = Packed(Block(16, 2, group=group, use_attn_mixer=mixer), rep)
    action = channels(rep)
    check(layer, features(3, 5, 16), action, action, group)


@few
@given(st.integers(1, 3), st.integers(1, 5))
def test_block_equivariant_with_tokens_that_move(height, width):
    grid = MirrorGrid(height, width)
    action = compose(channels(FLOP.regular(8)), tokens(grid.mirror))
    check(Packed(Block(8, 2), EIGHT), features(3, height * width, 8), action, action)


@few
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))
def test_mixer_block_equivariant(height, width, c):
    rep, axis = FLOP.regular(2 * c), MirrorGrid(height, width).rep
    action = compose(channels(rep), channels(axis, -2))
    check(Packed(MixerBlock(rep, axis), rep), features(3, axis.size, 2 * c), action, action)


@few
@given(st.integers(1, 3), st.integers(1, 6), st.sampled_from([0.0, 0.1]))
def test_conv_block_equivariant(height, width, init_value):
    layer = Packed(ConvBlock(8, init_value=init_value), EIGHT)
    check(layer, features(3, height, width, 8), PIXELS, PIXELS)


def test_block_formula():
    layer = random_layer(Block(8, 2))
    x = features(2, 5, 8)
    gamma_1, gamma_2, attn, norm1, norm2 = map(
        Packed, (layer.gamma_1, layer.gamma_2, layer.attn, layer.norm1, layer.norm2)
    )
    y = x + gamma_1(attn(norm1(x)))
    close(Packed(layer, EIGHT)(x), y + gamma_2(Packed(layer.mlp, EIGHT)(norm2(y))))


@pytest.mark.parametrize("middle", [0, 2])
def test_mixer_block_formula(middle):
    """The tables: lin_sym of the tokens on ss and as, of the channels on ss and sa; shifts on ss
    and on aa; GELU by the 4-point Hadamard transform, with a factor one half each way.

    Middle tokens have no sa and no aa: GELU by the 2-point transform, and at their places the
    shift of the others."""
    axis = Rep(FLOP, 3, middle)
    layer = random_layer(MixerBlock(EIGHT, axis))
    x = features(2, axis.size, 8)
    tokens_, fc1, fc2 = layer.attn, layer.mlp.fc1, layer.mlp.fc2
    halves = parts(Packed(layer.norm1)(x), axis, 4)
    blocks = (tokens_.lin_sym, tokens_.lin_asym, tokens_.lin_sym, tokens_.lin_asym)
    ss, sa, as_, aa = (part.mT @ block.weight.T for part, block in zip(halves, blocks, strict=True))
    ss, aa = ss + tokens_.lin_sym.bias, aa + tokens_.lin_asym.bias
    mixed = torch.cat([torch.cat([ss, sa], 2).mT, torch.cat([as_, aa], 2).mT], -1)
    y = x + Packed(layer.gamma_1)(mixed)

    def on_channels(four, linear):
        blocks = [linear.lin_sym, linear.lin_sym, linear.lin_asym, linear.lin_asym]
        out = [part @ block.weight.T for part, block in zip(four, blocks, strict=True)]
        return out[0] + linear.lin_sym.bias, out[1], out[2], out[3] + linear.lin_asym.bias

    def on_middle(s, a, linear):
        s, a = s @ linear.lin_sym.weight.T, a @ linear.lin_asym.weight.T
        return s + linear.lin_sym.bias / 2**0.5, a

    hadamard = torch.tensor(
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64
    )
    ss, sa, as_, aa = parts(Packed(layer.norm2)(y), axis, 4)
    s, a = on_middle(ss[:, 3:], as_[:, 3:], fc1)
    plus, minus = (quick_gelu((s + sign * a) / 2**0.5) for sign in (1, -1))
    s, a = on_middle((plus + minus) / 2**0.5, (plus - minus) / 2**0.5, fc2)
    hidden = torch.stack(on_channels((ss[:, :3], sa, as_[:, :3], aa), fc1))
    hidden = quick_gelu(torch.tensordot(hadamard / 2, hidden, 1))
    ss, sa, as_, aa = on_channels(torch.tensordot(hadamard / 2, hidden, 1).unbind(0), fc2)
    out = torch.cat([torch.cat([ss, s, sa], 1), torch.cat([as_, a, aa], 1)], -1)
    close(Packed(layer, EIGHT)(x), y + Packed(layer.gamma_2)(out))


@pytest.mark.parametrize("middle", [0, 2])
def test_places_and_back(middle):
    """Flopping exchanges l and r of both parts, and negates a middle column of a."""
    tokens_ = Rep(FLOP, 3, middle)
    layer = MixerBlock(EIGHT, tokens_)
    x = features(2, tokens_.size, 8)
    halves = tuple(x.chunk(2, -1))
    places = layer.to_places(halves)
    assert [p.shape for p in places] == 2 * [(2, 6 + middle, 4)]
    for place, half in zip(places, halves, strict=True):
        close(place.square().sum(), 2 * half.square().sum())  # the scale is that of all rows
    close(torch.cat(layer.from_places(places), -1), x)
    flopped = compose(channels(EIGHT), channels(tokens_, -2))(1, x)
    moved = layer.to_places(tuple(flopped.chunk(2, -1)))
    for sign, after, before in zip((1, -1), moved, places, strict=True):
        left, own, right = before.split([3, middle, 3], 1)
        close(after, torch.cat([right, sign * own, left], 1))


@pytest.mark.parametrize("init_value", [0.0, 0.1])
def test_conv_block_formula(init_value):
    layer = random_layer(ConvBlock(8, init_value=init_value))
    x = features(2, 3, 4, 8)
    y = layer.norm(layer.dwconv(tuple(x.chunk(2, -1))))
    y = layer.pwconv2(layer.act(layer.pwconv1(y)))
    assert (layer.gamma is None) == (init_value == 0)
    y = torch.cat(y if layer.gamma is None else layer.gamma(y), -1)
    close(Packed(layer, EIGHT)(x), x + y)


def make_blocks(drop_path):
    rep, axis = FLOP.regular(8), Rep(FLOP, 3)
    return [
        (Packed(Block(8, 2, drop_path=drop_path), rep), (6, 8)),
        (Packed(MixerBlock(rep, axis, drop_path=drop_path), rep), (6, 8)),
        (Packed(ConvBlock(8, drop_path=drop_path, init_value=0.1), rep), (2, 3, 8)),
        (OrdinaryMixerBlock(8, 6, drop_path=drop_path), (6, 8)),
        (OrdinaryConvBlock(8, drop_path=drop_path, init_value=0.1), (2, 3, 8)),
    ]


@pytest.mark.parametrize("index", range(5))
def test_stochastic_depth_draws_one_mask_a_sample_for_both_halves(index):
    layer, shape = make_blocks(0.5)[index]
    random_layer(layer)
    x = features(64, *shape)
    assert torch.equal(layer(x), layer(x))  # not in evaluation
    layer.train()
    torch.manual_seed(0)
    with torch.no_grad():
        change = (layer(x) - x).flatten(1)
    dropped = change.count_nonzero(1) == 0
    # a transformer's two branches are both dropped for a quarter of the samples
    assert 4 <= dropped.sum() <= 50
    halves = change.view(64, *shape)[~dropped].unflatten(-1, (2, 4)).abs().flatten(1, -3).sum(1)
    assert (halves > 0).all()


def test_broken_blocks_are_found():
    x, action = features(3, 6, 8), channels(FLOP.regular(8))
    breaks(random_layer(OrdinaryBlock(8, 2)), x, action, action)
    both = compose(action, channels(Rep(FLOP, 3), -2))
    breaks(random_layer(OrdinaryMixerBlock(8, 6)), x, both, both)
    # right channels, wrong tokens: they are packed, and not in mirror order
    layer = random_layer(Packed(MixerBlock(EIGHT, Rep(FLOP, 3)), EIGHT))
    check(layer, x, both, both)
    moving = compose(action, tokens(MirrorGrid(1, 6).mirror))
    breaks(layer, x, moving, moving)
    breaks(random_layer(OrdinaryConvBlock(8)), features(3, 2, 5, 8), PIXELS, PIXELS)


# The ordinary twins do what timm's blocks do, under other key names.


def renamed(state: dict, names: dict[str, str]) -> dict:
    """Keys with parts replaced, values of timm's shapes."""
    out = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        out[key] = value
    return out


def test_ordinary_block_is_timms():
    ours = random_layer(OrdinaryBlock(8, 2, init_values=0.1))
    norm = OrdinaryBlock(8, 2).norm1.eps
    theirs = TimmBlock(
        8, 2, qkv_bias=True, init_values=0.1, norm_layer=lambda d, **k: nn.LayerNorm(d, norm)
    )
    names = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    theirs.double().load_state_dict(renamed(ours.state_dict(), names))
    x = features(2, 5, 8)
    close(ours(x), theirs(x))


def test_ordinary_mixer_block_is_timms():
    ours = random_layer(OrdinaryMixerBlock(8, 6))
    theirs = TimmMixerBlock(8, 6, norm_layer=OrdinaryAffine)
    names = {"attn": "linear_tokens", "mlp": "mlp_channels", "gamma_": "ls"}
    theirs.double().load_state_dict(renamed(ours.state_dict(), names))
    x = features(2, 6, 8)
    close(ours(x), theirs(x))


@pytest.mark.parametrize("init_value", [0.0, 0.1])
def test_ordinary_conv_block_is_timms(init_value):
    ours = random_layer(OrdinaryConvBlock(8, init_value=init_value))
    theirs = TimmConvBlock(8, ls_init_value=init_value or None, conv_mlp=True)
    names = {"dwconv": "conv_dw", "pwconv": "mlp.fc"}
    theirs.double().load_state_dict(renamed(ours.state_dict(), names))
    x = features(2, 3, 5, 8)
    close(ours(x), theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    "layer",
    [OrdinaryBlock(8, 2, init_values=0.3), OrdinaryMixerBlock(8, 6, init_values=0.3)],
    ids=["transformer", "mixer"],
)
def test_initial_layer_scale_comes_back(layer):
    random_layer(layer)
    layer.reset_parameters()
    assert torch.equal(layer.gamma_1, torch.full_like(layer.gamma_1, 0.3))
    assert torch.equal(layer.gamma_2, torch.full_like(layer.gamma_2, 0.3))
