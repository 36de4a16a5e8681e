"""Linear: a dense block for each irrep, with shifts on invariant parts alone."""

import pytest
import torch
from checks import BOTH_GROUPS, breaks, check, close, features, few, parts, random_layer
from hypothesis import given
from hypothesis import strategies as st

from deit.equivariance import channels, compose
from deit.groups import FLOP, FLOP_X_FLOP, OCTIC, Rep
from deit.layers import Linear, invariant_bias


@BOTH_GROUPS
@few
@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_equivariant(group, n_in, n_out, bias, pointwise):
    layer = Linear(8 * n_in, 8 * n_out, bias, group=group, pointwise=pointwise)
    check(layer, features(3, 5, 8 * n_in), channels(layer.in_rep), channels(layer.out_rep), group)


@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.integers(0, 3))
def test_equivariant_across_decomposed_tokens(n_in, n_out, left, middle):
    tokens = Rep(FLOP, left + 1, middle)
    layer = Linear(2 * n_in, 2 * n_out, across=tokens)
    x = features(3, tokens.size, 2 * n_in)
    both = [compose(channels(r), channels(tokens, -2)) for r in (layer.in_rep, layer.out_rep)]
    check(layer, x, *both)


@few
@given(st.integers(0, 4), st.integers(0, 3), st.integers(1, 3))
def test_equivariant_along_tokens(left, middle, c):
    """The token axis is no special case: the same layer, with the axes exchanged."""
    tokens, rep = Rep(FLOP, left + 1, middle), FLOP.regular(2 * c)
    layer = Linear(tokens, tokens, across=rep, prefix="lin")
    x = features(3, 2 * c, tokens.size)
    action = compose(channels(tokens), channels(rep, -2))
    check(layer, x, action, action)


def test_formula():
    layer = random_layer(Linear(6, 10))
    s, a = features(4, 6).chunk(2, -1)
    sym, asym = layer.linear_sym, layer.linear_asym
    expected = torch.cat([s @ sym.weight.T + sym.bias, a @ asym.weight.T], -1)
    close(layer(torch.cat([s, a], -1)), expected)
    assert asym.bias is None


@pytest.mark.parametrize("middle", [0, 2])
def test_formula_across(middle):
    """The table: lin_sym on ss and sa, lin_asym on as and aa; shifts on ss and on aa."""
    tokens = Rep(FLOP, 3, middle)
    layer = random_layer(Linear(4, 6, across=tokens, prefix="lin"))
    x = features(2, tokens.size, 4)
    ss, sa, as_, aa = parts(x, tokens, 2)
    sym, asym = layer.lin_sym, layer.lin_asym
    got = parts(layer(x), tokens, 3)
    close(got[0], ss @ sym.weight.T + sym.bias)
    close(got[1], sa @ sym.weight.T)
    close(got[2], as_ @ asym.weight.T)
    close(got[3], aa @ asym.weight.T + asym.bias)


def test_pointwise_weights_are_those_of_a_convolution():
    plain, conv = Linear(6, 8), Linear(6, 8, pointwise=True)
    assert conv.linear_sym.weight.shape == (4, 3, 1, 1)
    conv.load_state_dict({k: v[..., None, None] if v.ndim == 2 else v
                          for k, v in plain.state_dict().items()})  # fmt: skip
    x = features(2, 3, 3, 6).float()
    torch.testing.assert_close(conv(x), plain(x))


@BOTH_GROUPS
def test_gains_are_factors_on_input_and_output(group):
    layer = random_layer(Linear(16, 8, group=group))
    x = features(3, 16)
    got = layer.map(layer.in_rep.split(x), in_gain=0.3, out_gain=-2.0)
    close(torch.cat(got, -1), -2.0 * layer(0.3 * x))


def test_half_the_weights_of_a_dense_map():
    count = sum(block.weight.numel() for block in Linear(64, 32).blocks())
    assert count == 64 * 32 // 2
    # the octic group: four blocks of an eighth each way and one of a quarter, used twice
    octic = Linear(64, 32, group=OCTIC)
    assert sum(block.weight.numel() for block in octic.blocks()) == 64 * 32 * (4 + 4) // 64


@BOTH_GROUPS
def test_broken_twins_are_found(group):
    layer = random_layer(Linear(16, 16, group=group))
    x, action = features(3, 4, 16), channels(layer.in_rep)
    shift = features(16, seed=1)
    breaks(lambda y: layer(y) + shift, x, action, action, group)
    breaks(lambda y: layer(y.flip(-1)), x, action, action, group)
    dense = features(16, 16, seed=2)
    breaks(lambda y: y @ dense, x, action, action, group)


def test_a_shift_in_the_wrong_rows_is_found():
    tokens = Rep(FLOP, 3)
    layer = random_layer(Linear(4, 4, across=tokens))
    action = compose(channels(layer.in_rep), channels(tokens, -2))
    breaks(lambda y: layer(y) + layer.linear_sym.bias[0], features(2, 6, 4), action, action)


def test_errors_name_the_rule():
    with pytest.raises(ValueError, match=r"7 features.*multiple of 2"):
        Linear(7, 4)
    with pytest.raises(ValueError, match=r"12 features.*multiple of 8"):
        Linear(16, 12, group=OCTIC)
    with pytest.raises(ValueError, match="different groups: flop and octic"):
        Linear(FLOP.regular(8), OCTIC.regular(8))
    with pytest.raises(NotImplementedError, match="more than one dimension"):
        invariant_bias(torch.zeros(2), 4, OCTIC.regular(8), OCTIC.regular(8))


def test_four_irreps_of_one_dimension():
    layer = Linear(8, 12, group=FLOP_X_FLOP)
    assert [name for name, _ in layer.named_parameters()] == [
        "linear_sym_sym.weight", "linear_sym_sym.bias", "linear_sym_asym.weight",
        "linear_asym_sym.weight", "linear_asym_asym.weight",
    ]  # fmt: skip
    check(layer, features(2, 3, 8), channels(layer.in_rep), channels(layer.out_rep), FLOP_X_FLOP)
