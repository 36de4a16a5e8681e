"""GELU in the regular basis."""

import pytest
import torch
import torch.nn.functional as F
from checks import BOTH_GROUPS, Packed, breaks, check, close, features, few
from hypothesis import given
from hypothesis import strategies as st

from deit.equivariance import channels
from deit.groups import FLOP
from deit.layers import GELU, Linear, quick_gelu

ACTS = pytest.mark.parametrize("act", [F.gelu, quick_gelu])


@BOTH_GROUPS
@few
@given(st.integers(1, 4))
def test_equivariant(group, n):
    layer = Packed(GELU(8 * n, group=group))
    check(layer, features(3, 5, 8 * n), channels(layer.rep), channels(layer.rep), group)


@ACTS
def test_formula(act):
    s, a = features(4, 6).chunk(2, -1)
    plus, minus = act((s + a) / 2**0.5), act((s - a) / 2**0.5)
    expected = torch.cat([plus + minus, plus - minus], -1) / 2**0.5
    close(Packed(GELU(6, act))(torch.cat([s, a], -1)), expected)


@BOTH_GROUPS
def test_scaled_features_stay_scaled(group):
    x = features(3, 5, 16)
    plain, scaled = Packed(GELU(16, group=group)), Packed(GELU(16, group=group, scale=3.0))
    close(scaled(3 * x), 3 * plain(x))


def test_quick_gelu():
    x = features(100)
    close(quick_gelu(x), x * torch.sigmoid(1.702 * x))
    assert (quick_gelu(x) - F.gelu(x)).abs().max() > 1e-3


@BOTH_GROUPS
def test_broken_twins_are_found(group):
    rep = group.regular(16)
    x, action = features(3, 4, 16), channels(rep)
    breaks(F.gelu, x, action, action, group)  # in the basis of irreps


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
    close(
        torch.cat(second(act(first(tuple(x.chunk(2, -1))))), -1),
        FLOP.regular(4).from_regular(regular),
    )
