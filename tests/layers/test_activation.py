"""GELU in the regular basis of one axis or two."""

import pytest
import torch
import torch.nn.functional as F
from checks import BOTH_GROUPS, breaks, check, close, features, few, parts
from hypothesis import given
from hypothesis import strategies as st

from deit.equivariance import channels, compose
from deit.groups import FLOP, OCTIC, Rep
from deit.layers import GELU, Linear, quick_gelu

ACTS = pytest.mark.parametrize("act", [F.gelu, quick_gelu])


@BOTH_GROUPS
@few
@given(st.integers(1, 4))
def test_equivariant(group, n):
    layer = GELU(8 * n, group=group)
    check(layer, features(3, 5, 8 * n), channels(layer.rep), channels(layer.rep), group)


@few
@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 3))
def test_equivariant_across_decomposed_tokens(c, left, middle):
    tokens = Rep(FLOP, left + 1, middle)
    layer = GELU(2 * c, quick_gelu, across=tokens)
    action = compose(channels(layer.rep), channels(tokens, -2))
    check(layer, features(3, tokens.size, 2 * c), action, action)


@ACTS
def test_formula(act):
    s, a = features(4, 6).chunk(2, -1)
    plus, minus = act((s + a) / 2**0.5), act((s - a) / 2**0.5)
    expected = torch.cat([plus + minus, plus - minus], -1) / 2**0.5
    close(GELU(6, act)(torch.cat([s, a], -1)), expected)


@ACTS
def test_formula_across_is_the_hadamard_transform_with_factor_half(act):
    tokens = Rep(FLOP, 3)
    x = features(2, 6, 4)
    basis = torch.stack(parts(x, tokens, 2))
    hadamard = torch.tensor(
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64
    )
    regular = act(torch.tensordot(hadamard / 2, basis, 1))
    expected = torch.tensordot(hadamard / 2, regular, 1)
    got = parts(GELU(4, act, across=tokens)(x), tokens, 2)
    for i in range(4):
        close(got[i], expected[i])


def test_a_middle_column_is_left_in_place():
    """Its tokens are their own mirror images: only their channels are transformed."""
    tokens = Rep(FLOP, 2, 3)
    x = features(2, 7, 4)
    got = GELU(4, across=tokens)(x)[:, 2:5]
    close(got, GELU(4)(x[:, 2:5]))


def test_quick_gelu():
    x = features(100)
    close(quick_gelu(x), x * torch.sigmoid(1.702 * x))
    assert (quick_gelu(x) - F.gelu(x)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("group", "across"),
    [(FLOP, None), (OCTIC, None), (FLOP, Rep(FLOP, 3)), (FLOP, Rep(FLOP, 2, 2))],
)
def test_factors_left_to_matrix_products(group, across):
    """`map` between two linear layers that apply its gain is the layer itself."""
    layer = GELU(16, group=group, across=across)
    x = features(2, 6, 16)
    got = layer.map([part * layer.gain for part in layer.rep.split(x)])
    close(torch.cat(got, -1) * layer.gain, layer(x))
    assert (layer.gain == 1.0) == (group.order > 2)


@BOTH_GROUPS
def test_broken_twins_are_found(group):
    rep = group.regular(16)
    x, action = features(3, 4, 16), channels(rep)
    breaks(F.gelu, x, action, action, group)  # in the basis of irreps


def test_leaving_out_an_axis_is_found():
    tokens = Rep(FLOP, 2)
    action = compose(channels(FLOP.regular(8)), channels(tokens, -2))
    breaks(GELU(8), features(3, 4, 8), action, action)


def test_equals_an_ordinary_network_in_the_regular_basis():
    """A two-layer perceptron of irreps is one of shared weights on the mirrored copies."""
    first, act, second = Linear(4, 8).double(), GELU(8), Linear(8, 4).double()

    def dense(layer):
        blocks = torch.block_diag(*(block.weight for block in layer.blocks()))
        q_in, q_out = (
            rep.from_regular(torch.eye(rep.size, dtype=torch.float64), 0)
            for rep in (layer.in_rep, layer.out_rep)
        )
        return q_out.mT @ blocks @ q_in, layer.out_rep.to_regular(
            F.pad(layer.linear_sym.bias, (0, layer.out_rep.size // 2))
        )

    x = features(3, 4)
    (w1, b1), (w2, b2) = dense(first), dense(second)
    regular = F.gelu(FLOP.regular(4).to_regular(x) @ w1.mT + b1) @ w2.mT + b2
    close(second(act(first(x))), FLOP.regular(4).from_regular(regular))
