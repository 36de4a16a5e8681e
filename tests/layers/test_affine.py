"""Affine and LayerScale: one scale for each irrep, shifts on invariant parts alone."""

import pytest
import torch
from checks import BOTH_GROUPS, Packed, breaks, check, close, features, few, parts, random_layer
from hypothesis import given
from hypothesis import strategies as st

from deit.equivariance import channels, compose
from deit.groups import FLOP, OCTIC, Rep
from deit.layers import Affine, LayerScale, OrdinaryAffine


@BOTH_GROUPS
@few
@given(st.integers(1, 4), st.booleans())
def test_equivariant(group, n, shift):
    layer = Packed(Affine(8 * n, shift, group=group))
    check(layer, features(3, 5, 8 * n), channels(layer.rep), channels(layer.rep), group)


@few
@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 3))
def test_equivariant_across_decomposed_tokens(c, left, middle):
    tokens = Rep(FLOP, left + 1, middle)
    layer = Packed(Affine(2 * c, across=tokens))
    action = compose(channels(layer.rep), channels(tokens, -2))
    check(layer, features(3, tokens.size, 2 * c), action, action)


def test_formula():
    layer = random_layer(Affine(6))
    s, a = features(4, 6).chunk(2, -1)
    expected = torch.cat([layer.alpha_sym * s + layer.beta, layer.alpha_asym * a], -1)
    close(Packed(layer)(torch.cat([s, a], -1)), expected)


@pytest.mark.parametrize("middle", [0, 2])
def test_formula_across(middle):
    """The table: alpha_sym on ss and sa, alpha_asym on the others; beta on ss and on aa."""
    tokens = Rep(FLOP, 3, middle)
    layer = random_layer(Affine(4, across=tokens))
    x = features(2, tokens.size, 4)
    ss, sa, as_, aa = parts(x, tokens, 2)
    got = parts(Packed(layer)(x), tokens, 2)
    close(got[0], layer.alpha_sym * ss + layer.beta_sym)
    close(got[1], layer.alpha_sym * sa)
    close(got[2], layer.alpha_asym * as_)
    close(got[3], layer.alpha_asym * aa + layer.beta_asym)


def test_layer_scale():
    layer = LayerScale(6, 1e-5)
    assert {k: v.tolist() for k, v in layer.state_dict().items()} == {
        "alpha_sym": pytest.approx([1e-5] * 3),
        "alpha_asym": pytest.approx([1e-5] * 3),
    }
    random_layer(layer)
    x = features(2, 6)
    close(Packed(layer)(x), x * torch.cat([layer.alpha_sym, layer.alpha_asym]))
    layer.reset_parameters()
    torch.testing.assert_close(Packed(layer)(x), 1e-5 * x)


def test_ordinary_affine():
    layer = random_layer(OrdinaryAffine(5))
    x = features(2, 3, 5)
    close(layer(x), layer.alpha * x + layer.beta)
    layer.reset_parameters()
    assert torch.equal(layer(x), x)


@BOTH_GROUPS
def test_broken_twins_are_found(group):
    layer = random_layer(Packed(Affine(16, group=group)))
    x, action = features(3, 4, 16), channels(layer.rep)
    shift = torch.ones(16, dtype=torch.float64)
    breaks(lambda y: layer(y) + shift, x, action, action, group)


def test_no_shift_across_an_irrep_of_two_dimensions():
    with pytest.raises(NotImplementedError, match="more than one dimension"):
        Affine(16, group=OCTIC, across=OCTIC.regular(8))


def test_different_scales_of_the_components_of_an_irrep_are_found():
    rep, scale = OCTIC.regular(16), features(16).abs()
    breaks(lambda y: y * scale, features(3, 4, 16), channels(rep), channels(rep), OCTIC)


def test_a_shift_of_all_tokens_is_found():
    tokens = Rep(FLOP, 3)
    layer = random_layer(Packed(Affine(4, across=tokens)))
    action = compose(channels(layer.rep), channels(tokens, -2))
    shift = torch.tensor([1.0, 1, 0, 0], dtype=torch.float64)
    breaks(lambda y: layer(y) + shift, features(2, 6, 4), action, action)


def test_half_precision_takes_float32_parameters():
    """As under autocast: no error, and the result as exact as bfloat16 is."""
    layer = random_layer(Packed(Affine(8))).float()
    x = features(4, 8).bfloat16()
    torch.testing.assert_close(layer(x).float(), layer(x.float()), rtol=1e-2, atol=1e-2)
