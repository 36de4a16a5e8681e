"""The checker itself: it accepts what is equivariant, and refuses what is not or says nothing."""

from math import inf, nan

import pytest
import torch
from torch import nn

from deit.equivariance import (
    assert_equivariant,
    channels,
    compose,
    equivariance_error,
    image,
    invariant,
    measure,
    tokens,
    tolerance_of,
)
from deit.groups import FLOP, OCTIC
from deit.layers import Linear, MirrorGrid

REP = FLOP.regular(8)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOLERANCE = tolerance_of(torch.float64)
GROUPS = pytest.mark.parametrize("group", [FLOP, OCTIC], ids=lambda g: g.name)


def problem(y, moved, **options):
    return measure([y, moved], invariant, **options).problem(TOLERANCE)


@GROUPS
def test_accepts_an_equivariant_layer(group):
    rep = group.regular(16)
    x = tuple(rep.split(torch.randn(3, 4, 16, dtype=torch.float64)))
    layer = Linear(16, 16, group=group).double()
    report = assert_equivariant(layer, group, x, channels(rep), channels(rep))
    assert report.error < 1e-14
    assert report.contrast > 0.1
    assert str(report).startswith("error=")


@GROUPS
def test_refuses_a_dense_layer_and_one_that_ignores_its_input(group):
    """As modules of packed tensors, which the actions take too."""
    rep, x = group.regular(16), torch.randn(3, 4, 16, dtype=torch.float64)
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(nn.Linear(16, 16).double(), group, x, channels(rep), channels(rep))
    with pytest.raises(AssertionError, match=r"^vacuous"):
        assert_equivariant(torch.ones_like, group, x, channels(rep), invariant)


def test_all_elements_of_a_group_count():
    """The action of one commutes with itself, and not with all others."""
    rep, x = OCTIC.regular(16), torch.randn(3, 4, 16, dtype=torch.float64)
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(lambda x: rep.act(1, x), OCTIC, x, channels(rep), channels(rep))
    assert measure([X, X, 1.5 * X], invariant).error == pytest.approx(0.5)


def test_needs_two_samples():
    with pytest.raises(ValueError, match="two or more"):
        equivariance_error(nn.Identity(), FLOP, torch.randn(1, 8), invariant, invariant)


def test_actions_move_tensors_and_parts_alike():
    """Parts side by side are the packed tensor."""
    packed = torch.randn(2, 15, 8)
    parts = tuple(REP.split(packed))
    mirror = MirrorGrid(3, 5).mirror
    action = compose(channels(REP), tokens(mirror))
    assert torch.equal(action(1, packed), mirror(REP.act(1, packed)))
    assert torch.equal(torch.cat(action(1, parts), -1), action(1, packed))
    assert torch.equal(action(0, packed), packed)
    assert all(map(torch.equal, image(FLOP)(1, parts), (part.flip(-1) for part in parts)))


def test_tolerance_follows_the_dtype_and_the_depth():
    """At least as much as one rounding; a 16-bit type that accumulates in float32 is no worse."""
    for dtype in (torch.float64, torch.float32):
        assert tolerance_of(dtype) == pytest.approx(65 * torch.finfo(dtype).eps)
    assert tolerance_of(torch.bfloat16) == pytest.approx(5 * 2**-7, rel=1e-2)
    assert tolerance_of(torch.float16) == pytest.approx(5 * 2**-10, rel=1e-2)
    assert tolerance_of(torch.float32, depth=12) == tolerance_of(torch.float32)
    assert tolerance_of(torch.float32, depth=48) == 2 * tolerance_of(torch.float32)


def test_an_error_is_relative_to_each_samples_norm():
    """A small sample cannot hide behind a large one."""
    assert problem(X, X * (1 + 0.5 * TOLERANCE)) is None
    large = torch.cat([1e20 * X[:1], X[1:]])
    measured = measure([large, torch.cat([large[:2], 1.5 * large[2:3], large[3:]])], invariant)
    assert measured.errors == pytest.approx([0, 0, 0.5, 0])
    assert "error 5.0e-01 > tolerance" in measured.problem(TOLERANCE)


@pytest.mark.parametrize("value", [nan, inf])
def test_what_is_not_finite_fails(value):
    wrong = torch.cat([X[:1], torch.full_like(X[:1], value), X[2:]])
    for pair in ((wrong, X), (X, wrong), (wrong, wrong)):
        assert problem(*pair) == "not finite, or zero"


def test_zero_constant_and_dead_outputs_fail():
    """A part that is dead cannot hide behind the other."""
    assert problem(torch.zeros(4, 8), torch.zeros(4, 8)) == "not finite, or zero"
    same, dead = X[:1].expand(4, -1), (X[:, :4], torch.zeros(4, 4))
    for y in (same, dead, (X, same)):
        assert problem(y, y).startswith("vacuous")
    # what does not depend on the input need not differ
    assert problem(same, same, constant=True) is None
    assert problem(X[:1], -X[:1], constant=True) is not None
