"""The checker itself: it accepts what is equivariant, and refuses what is not or says nothing."""

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
    worst,
)
from deit.groups import FLOP, OCTIC
from deit.layers import Linear, MirrorGrid

REP = FLOP.regular(8)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOLERANCE = tolerance_of(torch.float64)


def check(module, group=FLOP, rep=REP):
    x = tuple(rep.split(torch.randn(3, 4, rep.size, dtype=torch.float64)))
    return assert_equivariant(module, group, x, channels(rep), channels(rep))


def problem(y, moved, **options):
    return measure(y, [(1, moved)], invariant, **options).problem(TOLERANCE)


@pytest.mark.parametrize("group", [FLOP, OCTIC], ids=lambda g: g.name)
def test_accepts_an_equivariant_layer(group):
    report = check(Linear(16, 16, group=group).double(), group, group.regular(16))
    assert report.error < 1e-14
    assert report.contrast > 0.1
    assert str(report).startswith("error=")


@pytest.mark.parametrize("group", [FLOP, OCTIC], ids=lambda g: g.name)
def test_refuses_a_dense_layer(group):
    """As a module of packed tensors, which the actions take too."""
    rep, dense = group.regular(16), nn.Linear(16, 16).double()
    with pytest.raises(AssertionError, match="not equivariant"):
        check(lambda x: tuple(rep.split(dense(torch.cat(x, -1)))), group, rep)
    x = torch.randn(3, 4, 16, dtype=torch.float64)
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(dense, group, x, channels(rep), channels(rep))


def test_refuses_a_module_that_ignores_its_input():
    constant = torch.ones(4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="vacuous"):
        check(lambda x: (constant.expand_as(x[0]), torch.zeros_like(x[1])))


def test_refuses_nan():
    with pytest.raises(AssertionError, match="not equivariant"):
        check(lambda x: tuple(part * float("nan") for part in x))


def test_needs_two_samples():
    with pytest.raises(ValueError, match="two or more"):
        equivariance_error(nn.Identity(), FLOP, torch.randn(1, 8), invariant, invariant)


def test_actions_move_tensors_and_parts_alike():
    """Parts side by side are the packed tensor."""
    packed = torch.randn(2, 15, 8)
    parts = tuple(REP.split(packed))
    action = compose(channels(REP), tokens(MirrorGrid(3, 5).mirror))
    assert torch.equal(torch.cat(action(1, parts), -1), action(1, packed))
    assert torch.equal(action(0, packed), packed)
    assert all(map(torch.equal, image(FLOP)(1, parts), (part.flip(-1) for part in parts)))


def test_tolerance_follows_the_dtype():
    """At least as much as one rounding; a 16-bit type that accumulates in float32 is no worse."""
    eps = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)}
    assert tolerance_of(torch.float64) == pytest.approx(65 * eps[torch.float64])
    assert tolerance_of(torch.float32) == pytest.approx(65 * eps[torch.float32])
    assert tolerance_of(torch.bfloat16) == pytest.approx(5 * 2**-7, rel=1e-2)
    assert tolerance_of(torch.float16) == pytest.approx(5 * 2**-10, rel=1e-2)


def test_tolerance_grows_with_the_depth():
    assert tolerance_of(torch.float32, depth=12) == tolerance_of(torch.float32)
    assert tolerance_of(torch.float32, depth=48) == 2 * tolerance_of(torch.float32)


def test_what_holds_has_no_problem():
    assert problem(X, X) is None
    assert problem(X, X * (1 + 0.5 * TOLERANCE)) is None


def test_an_error_is_relative_to_each_samples_norm():
    moved = X.clone()
    moved[2] *= 1.5
    measured = measure(X, [(1, moved)], invariant)
    assert measured.errors == pytest.approx([0, 0, 0.5, 0])
    assert "error 5.0e-01 > tolerance" in measured.problem(TOLERANCE)


def test_a_small_sample_cannot_hide_behind_a_large_one():
    y = X.clone()
    y[0] *= 1e20
    moved = y.clone()
    moved[1] *= 2
    assert "error" in problem(y, moved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["first", "second", "both"])
def test_what_is_not_finite_fails(value, side):
    first, second = X.clone(), X.clone()
    for y in {"first": [first], "second": [second], "both": [first, second]}[side]:
        y[1, 3] = value
    assert problem(first, second) == "not finite, or zero"


def test_zero_and_constant_outputs_fail():
    assert problem(torch.zeros(4, 8), torch.zeros(4, 8)) == "not finite, or zero"
    assert problem(*[X[:1].expand(4, -1)] * 2).startswith("vacuous")


def test_one_dead_part_fails():
    dead = (X[:, :4], torch.zeros(4, 4))
    assert problem(dead, dead).startswith("vacuous")


def test_a_constant_feature_need_not_differ():
    assert problem(*[X[:1].expand(4, -1)] * 2, constant=True) is None
    assert problem(X[:1], -X[:1], constant=True) is not None


def test_worst_prefers_nan():
    assert worst(1.0, 3.0, 2.0) == 3.0
    assert worst(1.0, float("nan"), float("inf")) != worst(1.0, float("nan"), float("inf"))
