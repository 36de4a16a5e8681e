"""The checker itself: it accepts what is equivariant and refuses what is not, or says nothing."""

import pytest
import torch
from torch import nn

from deit.equivariance import assert_equivariant, channels, equivariance_error, invariant
from deit.groups import FLOP, OCTIC
from deit.layers import Linear

REP = FLOP.regular(8)


def check(module, group=FLOP, rep=REP, x=None):
    x = torch.randn(3, 4, rep.size, dtype=torch.float64) if x is None else x
    return assert_equivariant(module, group, x, channels(rep), channels(rep))


def test_accepts_an_equivariant_layer():
    report = check(Linear(8, 8).double())
    assert report.error < 1e-14
    assert report.contrast > 0.1


@pytest.mark.parametrize("group", [FLOP, OCTIC], ids=lambda g: g.name)
def test_refuses_a_dense_layer(group):
    rep = group.regular(16)
    with pytest.raises(AssertionError, match="not equivariant"):
        check(nn.Linear(16, 16).double(), group, rep)


def test_refuses_a_module_that_ignores_its_input():
    constant = REP.from_regular(torch.ones(8, dtype=torch.float64))
    with pytest.raises(AssertionError, match="vacuous"):
        check(lambda x: constant.expand_as(x))


def test_refuses_nan():
    with pytest.raises(AssertionError, match="not equivariant"):
        check(lambda x: x * float("nan"))


def test_needs_two_samples():
    with pytest.raises(ValueError, match="two or more"):
        equivariance_error(nn.Identity(), FLOP, torch.randn(1, 8), invariant, invariant)
