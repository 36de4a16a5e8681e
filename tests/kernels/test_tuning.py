from __future__ import annotations

import types
import warnings

import pytest
import torch
from torch import Tensor

from deit.kernels import tuning
from deit.kernels.tuning import Candidate, Tuner

X = torch.arange(1.0, 13).reshape(3, 4)


class Counted:
    """A candidate that doubles, or does what it is told, and counts its calls."""

    def __init__(self, name: str, function=lambda x: 2 * x) -> None:
        self.calls, self.function = 0, function
        self.candidate = Candidate(name, self)

    def __call__(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        self.calls += 1
        return self.function(x)


def tuner(times: dict[str, float] | None = None) -> Tuner:
    """One that takes these times for measured ones, or one that must not measure."""

    def timer(run, best: float) -> float:
        return times[run.func.candidate.name if isinstance(run.func, Counted) else "?"]

    return Tuner(timer, lambda device: times is not None)


def test_runs_the_fastest_from_the_second_call_on() -> None:
    plain, slow, fast = Counted("plain"), Counted("slow"), Counted("fast")
    listed = [plain.candidate, slow.candidate, fast.candidate]
    tune = tuner({"plain": 2.0, "slow": 3.0, "fast": 1.0})
    for _ in range(3):
        assert torch.equal(tune.run("double", 7, plain.candidate, lambda: listed, X), 2 * X)
    assert (plain.calls, slow.calls, fast.calls) == (1, 1, 3)  # one check, then two runs
    (decision,) = tune.report()
    assert decision == (
        "double", "cpu", torch.float32, 7, "fast", {"plain": 2.0, "slow": 3.0, "fast": 1.0}
    )  # fmt: skip


def test_keys_dtypes_and_operations_are_decided_apart() -> None:
    plain = Counted("plain")
    tune = tuner()
    for op, key, x in [("f", 1, X), ("f", 2, X), ("g", 1, X), ("f", 1, X.double()), ("f", 1, X)]:
        tune.run(op, key, plain.candidate, lambda: [plain.candidate], x)
    assert len(tune.report()) == 4


def test_first_that_agrees_without_timing() -> None:
    plain, first, second = Counted("plain"), Counted("first"), Counted("second")
    listed = [first.candidate, second.candidate, plain.candidate]
    tune = tuner()
    for _ in range(2):
        tune.run("double", 0, plain.candidate, lambda: listed, X)
    assert (plain.calls, first.calls, second.calls) == (1, 2, 0)


def raises(x: Tensor) -> Tensor:
    raise RuntimeError("out of resources\nand more")


def wrong_corner(x: Tensor) -> Tensor:
    y = 2 * x
    y[-1, -1] += 0.1
    return y


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "out of resources$"),
        (wrong_corner, "differs from the plain implementation"),
        (lambda x: 2 * x * torch.where(x > 11, torch.nan, 1), "differs"),
        (lambda x: (2 * x).double(), "float64"),
        (lambda x: (2 * x)[1:], r"gave \(2, 4\)"),
        (lambda x: (2 * x, x), "gave 2 outputs"),
    ],
)
@pytest.mark.parametrize("timed", [True, False])
def test_drops_with_one_warning(function, message: str, timed: bool) -> None:
    plain, bad = Counted("plain"), Counted("bad", function)
    tune = tuner({"plain": 1.0} if timed else None)
    listed = [bad.candidate, plain.candidate]
    with pytest.warns(RuntimeWarning, match=message):
        assert torch.equal(tune.run("double", 0, plain.candidate, lambda: listed, X), 2 * X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for key in (0, 1):
            assert torch.equal(tune.run("double", key, plain.candidate, lambda: listed, X), 2 * X)
    assert bad.calls == 1  # not tried for other shapes either
    assert {d.chosen for d in tune.report()} == {"plain"}


def test_falls_back_when_the_chosen_one_fails_later() -> None:
    plain = Counted("plain")
    flaky = Counted("flaky", lambda x: 2 * x if flaky.calls == 1 else raises(x))
    tune = tuner()
    call = lambda: tune.run("f", 0, plain.candidate, lambda: [flaky.candidate], X)  # noqa: E731
    call()
    with pytest.warns(RuntimeWarning, match="out of resources"):
        assert torch.equal(call(), 2 * X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(), 2 * X)


def test_one_that_is_dropped_is_given_up_where_it_was_chosen() -> None:
    plain = Counted("plain")
    bad = Counted("bad", lambda x: 2 * x if len(x) == 3 else wrong_corner(x))
    tune = tuner()

    def call(key: int, x: Tensor) -> None:
        listed = [bad.candidate, plain.candidate]
        assert torch.equal(tune.run("f", key, plain.candidate, lambda: listed, x), 2 * x)

    call(3, X)
    call(3, X)
    assert (plain.calls, bad.calls) == (1, 2)
    with pytest.warns(RuntimeWarning, match="differs"):
        call(2, X[:2])
    call(3, X)
    call(3, X)
    assert (plain.calls, bad.calls) == (4, 3)
    assert {d.chosen for d in tune.report()} == {"plain"}


def test_want_of_memory_is_no_fault_of_a_candidate() -> None:
    def hungry(x: Tensor) -> Tensor:
        if len(x) == 3:
            raise torch.OutOfMemoryError("of a GPU")
        return 2 * x

    plain, other = Counted("plain"), Counted("other", hungry)
    tune = tuner()

    def call(key: int, x: Tensor) -> Tensor:
        listed = [other.candidate, plain.candidate]
        return tune.run("f", key, plain.candidate, lambda: listed, x)

    with pytest.warns(RuntimeWarning, match="of a GPU"):
        call(3, X)
    for _ in range(2):
        call(2, X[:2])
        call(3, X)
    assert [d.chosen for d in tune.report()] == ["plain", "other"]
    with pytest.raises(torch.OutOfMemoryError):
        call(2, X)
    assert torch.equal(call(2, X[:2]), 2 * X[:2])
    assert (plain.calls, other.calls) == (4, 5)


def test_a_failure_while_timing_drops_too() -> None:
    plain, bad = Counted("plain"), Counted("bad")
    tune = tuner({"plain": 1.0})  # KeyError for the other
    with pytest.warns(RuntimeWarning, match="KeyError"):
        tune.run("f", 0, plain.candidate, lambda: [bad.candidate, plain.candidate], X)
    assert tune.report()[0].chosen == "plain"


def test_the_plain_one_may_fail() -> None:
    plain = Counted("plain", raises)
    with pytest.raises(RuntimeError, match="out of resources"):
        tuner().run("f", 0, plain.candidate, lambda: [plain.candidate], X)


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_waits_for_results_that_can_be_judged(value: float, monkeypatch) -> None:
    plain, bad = Counted("plain"), Counted("bad", wrong_corner)
    listed = [bad.candidate, plain.candidate]
    tune = tuner()
    useless = torch.full((3, 4), value)
    result = tune.run("f", 0, plain.candidate, lambda: listed, useless)
    torch.testing.assert_close(result, 2 * useless, equal_nan=True)
    assert not tune.report()
    assert not bad.calls
    monkeypatch.setattr(tuning, "MAX_UNJUDGED", 3)
    for _ in range(2):
        tune.run("f", 0, plain.candidate, lambda: listed, useless)
    assert tune.report()[0].chosen == "plain"


def test_empty_outputs_and_inputs() -> None:
    plain = Counted("plain", lambda x: (2 * x, x.new_empty(0)))
    other = Counted("other", lambda x: (2 * x, x.new_empty(0)))
    tune = tuner()
    listed = [other.candidate, plain.candidate]
    tune.run("f", 0, plain.candidate, lambda: listed, X[:0])
    assert not tune.report()
    tune.run("f", 0, plain.candidate, lambda: listed, X)
    assert tune.report()[0].chosen == "other"
    # Nothing is launched for no elements, which share a decision with few.
    calls = other.calls
    assert tune.run("f", 0, plain.candidate, lambda: listed, X[:0])[0].shape == (0, 4)
    assert other.calls == calls


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.2), (torch.float16, 0.02)])
def test_check_allows_rounding_and_sees_a_wrong_element(dtype: torch.dtype, error: float) -> None:
    exact = torch.randn(1000, 64)
    rounded = exact.to(dtype)
    tolerance = tuning.TOLERANCES[dtype]
    assert tuning._disagreement(rounded, (exact * (1 + 1e-3)).to(dtype), tolerance) is None
    rounded_row = rounded.clone()
    rounded_row[-1] *= 1 + error
    assert "row" in tuning._disagreement(rounded, rounded_row, tolerance)
    column = rounded.clone()
    column[:, -1] *= 1 + error
    assert tuning._disagreement(rounded, column, tolerance) is not None


def test_check_in_chunks_is_the_same(monkeypatch) -> None:
    monkeypatch.setattr(tuning, "CHECKED_AT_ONCE", 8)
    assert tuning._disagreement(X, X, 1e-6) is None
    assert tuning._disagreement(X, wrong_corner(X) / 2, 1e-6) is not None


def test_only_forces_by_name() -> None:
    plain, other = Counted("plain"), Counted("triton_1", lambda x: 3 * x)
    tune = tuner()
    run = lambda: tune.run("f", 0, plain.candidate, lambda: [other.candidate], X)  # noqa: E731
    with tune.only("triton"):
        assert torch.equal(run(), 3 * X)  # unchecked
        with tune.only("cublas"):
            assert torch.equal(run(), 2 * X)
    assert not tune.report()


def test_timing_needs_a_gpu_and_permission(monkeypatch) -> None:
    cuda = torch.device("cuda", 0)
    assert not tuning._timing_allowed(torch.device("cpu"))
    assert tuning._timing_allowed(cuda)
    monkeypatch.setenv("DEIT_KERNELS_TUNE", "0")
    assert not tuning._timing_allowed(cuda)
    monkeypatch.delenv("DEIT_KERNELS_TUNE")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not tuning._timing_allowed(cuda)


def test_tf32_is_what_torch_was_told() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            assert tuning.tf32_allowed() is allowed
    finally:
        matmul.allow_tf32 = before


def test_buckets_are_powers_of_two() -> None:
    assert [tuning.bucket(n) for n in (0, 1, 2, 3, 4, 5, 8, 9)] == [0, 0, 1, 2, 2, 3, 3, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_times_on_a_gpu() -> None:
    small, large = (torch.randn(n, n, device="cuda") for n in (64, 8192))
    assert tuning.cuda_milliseconds(lambda: small @ small) < tuning.cuda_milliseconds(
        lambda: large @ large
    )


def test_factors_of_convolutions_may_be_rounded_where_torch_may_round_them(monkeypatch):
    def flag(value):
        return types.SimpleNamespace(fp32_precision=value)

    monkeypatch.setattr(torch.backends.cuda, "matmul", flag("ieee"))
    monkeypatch.setattr(torch.backends.cudnn, "conv", flag("tf32"), raising=False)
    assert tuning._may_round_factors("mirror_depthwise")
    assert not tuning._may_round_factors("mirror_linear")
    monkeypatch.setattr(torch.backends.cuda, "matmul", flag("tf32"))
    monkeypatch.setattr(torch.backends.cudnn, "conv", flag("ieee"), raising=False)
    assert not tuning._may_round_factors("mirror_depthwise_taps")
    assert tuning._may_round_factors("mirror_linear")
