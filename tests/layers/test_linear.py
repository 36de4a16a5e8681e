"""Linear: a dense block for each irrep, with shifts on invariant parts alone."""

import copy
import pickle

import pytest
import torch
from checks import BOTH_GROUPS, Packed, breaks, check, close, features, few, random_layer
from hypothesis import given
from hypothesis import strategies as st

from deit.equivariance import channels
from deit.groups import FLOP, FLOP_X_FLOP, OCTIC
from deit.layers import Linear


@BOTH_GROUPS
@few
@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_equivariant(group, n_in, n_out, bias, pointwise):
    layer = Linear(8 * n_in, 8 * n_out, bias, group=group, pointwise=pointwise)
    before, after = channels(layer.in_rep), channels(layer.out_rep)
    check(Packed(layer), features(3, 5, 8 * n_in), before, after, group)


def test_formula():
    layer = random_layer(Linear(6, 10))
    s, a = features(4, 6).chunk(2, -1)
    sym, asym = layer.linear_sym, layer.linear_asym
    expected = torch.cat([s @ sym.weight.T + sym.bias, a @ asym.weight.T], -1)
    close(Packed(layer)(torch.cat([s, a], -1)), expected)
    assert asym.bias is None


def test_every_part_of_an_invariant_feature_can_be_shifted():
    """Where the group moves places alone, both maps act on each place with their shifts."""
    layer = random_layer(Linear(4, 6, invariant=True))
    s, a = features(2, 5, 2), features(2, 5, 2, seed=1)
    y = layer((s, a))
    close(y[0], layer.linear_sym(s))
    close(y[1], a @ layer.linear_asym.weight.T + layer.linear_asym.bias)


def test_rows_without_a_shift():
    """Of the parts but the first; one call of each block, whatever it is; any rows."""
    s, a = features(2, 5, 2), features(2, 5, 2, seed=1)
    for start, count in ((2, 1), (0, 2), (3, 2), (0, 5)):
        layer = random_layer(Linear(4, 6, invariant=True, unshifted=(start, count)))
        calls = []
        layer.linear_asym.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        y = layer((s, a))
        close(y[0], layer.linear_sym(s))
        expected = a @ layer.linear_asym.weight.T
        shift = layer.linear_asym.bias.repeat(5, 1)
        shift[start : start + count] = 0
        close(y[1], expected + shift)
        assert calls == [1]
        layer.linear_asym = torch.nn.Sequential(layer.linear_asym)  # has no weight to look at
        close(layer((s, a))[1], y[1])


@pytest.mark.parametrize("assign", [False, True])
def test_pointwise_weights_look_like_those_of_a_convolution(assign):
    plain, conv = random_layer(Linear(6, 8)), Linear(6, 8, pointwise=True).double()
    state = plain.state_dict()
    shown = {k: v[..., None, None] if v.ndim == 2 else v for k, v in state.items()}
    for each in (shown, state):  # both shapes load
        conv.load_state_dict(each, assign=assign)
        assert {k: v.shape for k, v in conv.state_dict().items()} == {
            k: v.shape for k, v in shown.items()
        }
        assert conv.linear_sym.weight.shape == (4, 3)
        x = features(2, 3, 3, 6)
        close(Packed(conv)(x), Packed(plain)(x))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(conv)))
    assert copied.state_dict()["linear_asym.weight"].shape == (4, 3, 1, 1)


def test_half_the_weights_of_a_dense_map():
    count = sum(block.weight.numel() for block in Linear(64, 32).blocks())
    assert count == 64 * 32 // 2
    # the octic group: four blocks of an eighth each way and one of a quarter, used twice
    octic = Linear(64, 32, group=OCTIC)
    assert sum(block.weight.numel() for block in octic.blocks()) == 64 * 32 * (4 + 4) // 64


@BOTH_GROUPS
def test_broken_twins_are_found(group):
    layer = random_layer(Packed(Linear(16, 16, group=group)))
    x, action = features(3, 4, 16), channels(layer.rep)
    shift = features(16, seed=1)
    breaks(lambda y: layer(y) + shift, x, action, action, group)
    breaks(lambda y: layer(y.flip(-1)), x, action, action, group)
    dense = features(16, 16, seed=2)
    breaks(lambda y: y @ dense, x, action, action, group)


def test_errors_name_the_rule():
    with pytest.raises(ValueError, match=r"7 features.*multiple of 2"):
        Linear(7, 4)
    with pytest.raises(ValueError, match=r"12 features.*multiple of 8"):
        Linear(16, 12, group=OCTIC)
    with pytest.raises(ValueError, match="different groups: flop and octic"):
        Linear(FLOP.regular(8), OCTIC.regular(8))


def test_four_irreps_of_one_dimension():
    layer = Linear(8, 12, group=FLOP_X_FLOP)
    assert [name for name, _ in layer.named_parameters()] == [
        "linear_sym_sym.weight", "linear_sym_sym.bias", "linear_sym_asym.weight",
        "linear_asym_sym.weight", "linear_asym_asym.weight",
    ]  # fmt: skip
    before, after = channels(layer.in_rep), channels(layer.out_rep)
    check(Packed(layer), features(2, 3, 8), before, after, FLOP_X_FLOP)
