"""Errors, tolerances, and measurements that say nothing."""

import pytest
import torch

from deit.verify.features import MirroredTokens, in_rows
from deit.verify.measure import Feature, gradient_errors, is_far_off, measure, tolerance, worst

INVARIANT = in_rows(None)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOLERANCE = tolerance(torch.float64)


def problem(y, moved, feature=INVARIANT):
    return measure(y, [(1, moved)], feature).problem(TOLERANCE)


def test_tolerance_follows_the_dtype():
    """At least as much as one rounding; a 16-bit type that accumulates in float32 is no worse."""
    eps = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)}
    assert tolerance(torch.float64) == pytest.approx(65 * eps[torch.float64])
    assert tolerance(torch.float32) == pytest.approx(65 * eps[torch.float32])
    assert tolerance(torch.bfloat16) == pytest.approx(5 * 2**-7, rel=1e-2)
    assert tolerance(torch.float16) == pytest.approx(5 * 2**-10, rel=1e-2)


def test_tolerance_grows_with_the_depth():
    assert tolerance(torch.float32, depth=12) == tolerance(torch.float32)
    assert tolerance(torch.float32, depth=48) == 2 * tolerance(torch.float32)


def test_what_holds_has_no_problem():
    assert problem(X, X) is None
    assert problem(X, X * (1 + 0.5 * TOLERANCE)) is None


def test_an_error_is_relative_to_each_samples_norm():
    moved = X.clone()
    moved[2] *= 1.5
    measured = measure(X, [(1, moved)], INVARIANT)
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


def test_zero_fails():
    assert problem(torch.zeros(4, 8), torch.zeros(4, 8)) == "not finite, or zero"


def test_constant_outputs_fail():
    assert problem(*[X[:1].expand(4, -1)] * 2).startswith("vacuous")


def test_one_dead_irrep_fails():
    from deit.groups import FLOP

    feature = in_rows(FLOP.regular(8))
    dead = torch.cat([X[:, :4], torch.zeros(4, 4)], 1)
    assert problem(dead, dead, feature).startswith("vacuous")


def test_a_constant_feature_need_not_differ():
    feature = Feature(INVARIANT.act, constant=True)
    assert problem(*[X[:1].expand(4, -1)] * 2, feature) is None
    assert problem(X[:1], -X[:1], feature) is not None


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="two or more"):
        problem(X[:1], X[:1])


@pytest.mark.parametrize(
    ("twin", "own", "expected"),
    [(0.1, 1e-3, True), (0.1, 0.02, False), (0.015, 0.0, False), (float("nan"), 0.0, False)],
)
def test_a_twin_must_be_far_off(twin, own, expected):
    assert is_far_off(twin, own, tol=0.01) is expected


def test_worst_prefers_nan():
    assert worst(1.0, 3.0, 2.0) == 3.0
    assert worst(1.0, float("nan"), float("inf")) != worst(1.0, float("nan"), float("inf"))


@pytest.mark.parametrize(
    ("found", "error"),
    [
        ({"a": torch.ones(4), "b": None}, {"a": 0.0}),
        ({"a": 2 * torch.ones(4), "b": None}, {"a": 1.0}),
        ({"a": None, "b": None}, {"a": float("inf")}),
        ({"a": torch.ones(4), "b": torch.ones(1)}, {"a": 0.0, "b": float("inf")}),
    ],
)
def test_gradient_errors(found, error):
    assert gradient_errors({"a": torch.ones(4), "b": None}, found, floor=0.01) == error


def test_gradients_that_all_vanish_fail():
    (error,) = gradient_errors({"a": torch.zeros(3)}, {"a": torch.zeros(3)}, floor=0.01).values()
    assert error != error


def test_token_swap_agrees_with_flipping_the_grid():
    """The check's own token order, against the definition: left half, middle, right mirrored."""
    for width in (4, 5):
        place = torch.arange(3 * width).view(3, width)
        half = width // 2
        order = torch.cat(
            [
                place[:, :half].flatten(),
                place[:, half : width - half].flatten(),
                place[:, width - half :].flip(1).flatten(),
            ]
        )
        flopped = place.flip(1).flatten()[order]
        swapped = MirroredTokens(3, width).swap(order[None])[0]
        assert torch.equal(swapped, flopped)
