"""Attention: logits from all irreps, values that keep theirs."""

import pytest
import torch
from checks import BOTH_GROUPS, Packed, breaks, check, close, features, few, random_layer
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deit.equivariance import channels, compose, tokens
from deit.groups import OCTIC
from deit.layers import Attention, MirrorGrid


@BOTH_GROUPS
@pytest.mark.parametrize("mode", ["fused", "explicit", "mixer"])
@few
@given(heads=st.integers(1, 3), n=st.integers(1, 3), bias=st.booleans())
def test_equivariant(group, mode, heads, n, bias):
    dim = group.order * heads * n
    options = dict(use_fused_attn=mode == "fused", use_attn_mixer=mode == "mixer")
    layer = Packed(Attention(dim, heads, qkv_bias=bias, group=group, **options))
    check(layer, features(3, 5, dim), channels(layer.rep), channels(layer.rep), group)


@few
@given(st.integers(1, 3), st.integers(1, 5))
def test_equivariant_with_tokens_that_move(height, width):
    grid = MirrorGrid(height, width)
    layer = Packed(Attention(8, 2))
    action = compose(channels(layer.rep), tokens(grid.mirror))
    check(layer, features(3, height * width, 8), action, action)


@pytest.mark.parametrize("mixer", [None, (1.0, 0.0), (0.7, -0.4)])
def test_formula(mixer):
    """The table, head by head: q = [q_s, q_a], each irrep's outputs laid out (3, heads, width)."""
    dim, heads = 12, 3
    width = dim // heads // 2
    layer = Attention(dim, heads, use_attn_mixer=mixer is not None, use_fused_attn=False)
    random_layer(layer)
    m = (1.0, 1.0) if mixer is None else mixer
    if mixer is not None:
        layer.attn_mixer.data = torch.tensor(mixer, dtype=torch.float64)
    x = features(2, 5, dim)
    s, a = x.chunk(2, -1)
    qkv = layer.qkv
    sym = (s @ qkv.linear_sym.weight.T + qkv.linear_sym.bias).view(2, 5, 3, heads, width)
    asym = (a @ qkv.linear_asym.weight.T).view(2, 5, 3, heads, width)
    out_s, out_a = [], []
    for h in range(heads):
        (q_s, k_s, v_s), (q_a, k_a, v_a) = sym[..., h, :].unbind(2), asym[..., h, :].unbind(2)
        logits = (m[0] * q_s @ k_s.mT + m[1] * q_a @ k_a.mT) * (dim / heads) ** -0.5
        weights = logits.softmax(-1)
        out_s.append(weights @ v_s)
        out_a.append(weights @ v_a)
    out_s, out_a = torch.cat(out_s, -1), torch.cat(out_a, -1)
    proj = layer.proj
    expected = torch.cat(
        [
            out_s @ proj.linear_sym.weight.T + proj.linear_sym.bias,
            out_a @ proj.linear_asym.weight.T,
        ],
        -1,
    )
    close(Packed(layer)(x), expected)


@BOTH_GROUPS
def test_fused_is_explicit(group):
    fused = random_layer(Attention(16, 2, use_fused_attn=True, group=group))
    explicit = Attention(16, 2, use_fused_attn=False, group=group).double()
    explicit.load_state_dict(fused.state_dict())
    assert fused.fused_attn
    assert not explicit.fused_attn
    x = features(3, 7, 16)
    close(Packed(fused)(x), Packed(explicit)(x))


def test_initial_mixer_looks_at_the_trivial_irrep_alone():
    layer = Attention(16, 2, use_attn_mixer=True, group=OCTIC)
    assert layer.attn_mixer.tolist() == [1, 0, 0, 0, 0]
    assert "attn_mixer" in dict(layer.named_parameters())


def test_attention_dropout_acts_in_training_alone():
    for fused in (True, False):
        layer = Packed(Attention(8, 2, attn_drop=0.5, use_fused_attn=fused))
        x = features(2, 6, 8).float()
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))


@BOTH_GROUPS
def test_broken_twins_are_found(group):
    x = features(3, 5, 16)
    layer = random_layer(Attention(16, 2, group=group))
    action = channels(layer.rep)
    # a shift where none is allowed
    last = layer.qkv.blocks()[-1]
    last.bias = nn.Parameter(features(last.weight.shape[0]))
    breaks(Packed(layer), x, action, action, group)
    # heads that mix the irreps up
    layer = random_layer(Attention(16, 2, group=group))
    split = layer.split_heads
    layer.split_heads = lambda qkv: tuple(
        t.roll(1, -1) if i == 2 else t for i, t in enumerate(split(qkv))
    )
    breaks(Packed(layer), x, action, action, group)


def test_errors_name_the_rule():
    with pytest.raises(ValueError, match=r"width 10 .* 2 heads .* multiple of 4"):
        Attention(10, 2)
    with pytest.raises(ValueError, match="never forms"):
        Attention(8, 2, use_fused_attn=True, use_attn_mixer=True)
    # left to the layer, fused attention gives way to the mixer
    assert not Attention(8, 2, use_attn_mixer=True).fused_attn
