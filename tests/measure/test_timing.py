"""Timing in turns, the roofline, and the plan that follows from it."""

from types import SimpleNamespace

import pytest
import torch

from deit.measure import plan
from deit.measure.flops import MatMul
from deit.measure.measure import Result
from deit.measure.options import parse_args
from deit.measure.roofline import PeakRates, bound, measure_peak_rates
from deit.measure.timing import FEWEST, Timing, alternate

CPU = torch.device("cpu")


def test_steps_take_turns_and_meet_the_minimum(monkeypatch):
    calls, samples, clock = [], [], [0.0]
    monkeypatch.setattr("deit.measure.timing.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def step(name, seconds):
        def run():
            calls.append(name)
            clock[0] += seconds

        return run

    steps = {"slow": step("slow", 1 / 64), "fast": step("fast", 1 / 512)}
    timings = alternate(steps, CPU, 10 / 128, samples.append)
    assert (timings["slow"].median, timings["fast"].median) == (1 / 64, 1 / 512)
    assert samples[:4] == ["slow", "fast", "fast", "slow"]
    for name, timing in timings.items():
        assert len(timing.samples) == samples.count(name) >= FEWEST
        repeats = (calls.count(name) - 1) // len(timing.samples)  # one call is for calibration
        assert sum(timing.samples) * repeats >= 10 / 128
    # a sample of the fast one is several steps, a tenth of the minimum
    assert calls.count("fast") == 1 + 4 * samples.count("fast")
    assert calls.count("slow") == 1 + samples.count("slow")
    # without a minimum still enough for a median
    assert len(alternate(steps, CPU, 0.0)["slow"].samples) == FEWEST


def test_median_and_spread():
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert timing.median == 3.0
    assert timing.spread == pytest.approx((4.0 - 2.0) / 2 / 3.0)
    assert Timing((2.0, 2.0, 2.0)).spread == 0.0


@pytest.mark.parametrize(
    ("matmuls", "batch", "size", "rates", "images_per_s", "arithmetic"),
    [
        # 2 x 1000 operations an image
        ([MatMul(1000, moved=30, weights=40)], 4, 2, (2000, 1e9), 1, 1),
        # (30 * 4 + 40) elements of 2 bytes
        ([MatMul(1000, moved=30, weights=40)], 4, 2, (1e9, 320), 4, 0),
        # products one after the other: 3 s of arithmetic, 1 s of traffic
        ([MatMul(3, 0, 0), MatMul(0, 1, 0)], 1, 1, (2, 1), 1 / 4, 3 / 4),
    ],
)
def test_bound(matmuls, batch, size, rates, images_per_s, arithmetic):
    found = bound(matmuls, batch, size, PeakRates(*rates))
    assert found == (pytest.approx(images_per_s), pytest.approx(arithmetic))


def test_peak_rates_are_of_the_fastest_samples(monkeypatch):
    timings = {"multiply": Timing((2.0, 1.0, 4.0)), "copy": Timing((8.0, 0.5))}
    monkeypatch.setattr("deit.measure.roofline.alternate", lambda *_, **__: timings)
    assert measure_peak_rates(CPU, torch.float32) == PeakRates(2 * 2048**3, 2 * 4 * 2**26 / 0.5)


def test_plan():
    """A step of 1 s at the peak rate takes 2.5 s: four of them untimed, three samples."""
    members = [Result(name, 1, 1.0, matmuls=[MatMul(10**9, 10, 10)] * 50) for name in "ab"]
    rates = PeakRates(1e11, 1e11)
    eager, compiled, training = (
        [plan.estimate(members, parse_args(["--device=cpu", "--batch-size=1", *more]), rates)] * 3
        for more in ([], ["--compile"], ["--train"])
    )
    assert plan.describe(6, eager, default=False) == "6 networks in 3 groups, about 1min 45s"
    assert "26 published networks" in plan.describe(6, eager, default=True)
    assert "compiling takes about 2min" in plan.describe(6, compiled, default=False)
    assert sum(training[0]) > 3 * sum(eager[0])
    # the first of three comparisons took as long as all were to take
    whole = 3 * sum(eager[0])
    assert plan.seconds_left(eager, 1, elapsed=whole) == pytest.approx(2 * whole)
