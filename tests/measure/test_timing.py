"""Timing in turns, and the roofline."""

from types import SimpleNamespace

import pytest
import torch

from deit.measure.flops import MatMul
from deit.measure.roofline import PeakRates, bound
from deit.measure.timing import FEWEST, Timing, alternate

CPU = torch.device("cpu")


def test_steps_take_turns_and_meet_the_minimum(monkeypatch):
    calls = []
    clock = [0.0]
    monkeypatch.setattr("deit.measure.timing.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def step(name, seconds):
        def run():
            calls.append(name)
            clock[0] += seconds

        return run

    samples = []
    timings = alternate(
        {"slow": step("slow", 1 / 64), "fast": step("fast", 1 / 512)}, CPU, 10 / 128, samples.append
    )
    assert timings["slow"].median == 1 / 64
    assert timings["fast"].median == 1 / 512
    assert samples[:4] == ["slow", "fast", "fast", "slow"]
    for name, timing in timings.items():
        assert len(timing.samples) == samples.count(name) >= FEWEST
        repeats = (calls.count(name) - 1) // len(timing.samples)  # one call is for calibration
        assert sum(timing.samples) * repeats >= 10 / 128
    # a sample of the fast one is several steps, a tenth of the minimum
    assert calls.count("fast") == 1 + 4 * samples.count("fast")
    assert calls.count("slow") == 1 + samples.count("slow")


def test_no_minimum_still_gives_a_median():
    timings = alternate({"one": lambda: None}, CPU, 0.0)
    assert len(timings["one"].samples) == FEWEST


def test_median_and_spread():
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert timing.median == 3.0
    assert timing.spread == pytest.approx((4.0 - 2.0) / 2 / 3.0)
    assert Timing((2.0, 2.0, 2.0)).spread == 0.0


def test_bound_of_one_product():
    matmul = MatMul(multiply_adds=1000, moved=30, weights=40)
    fast_memory = PeakRates(flops_per_s=2000, bytes_per_s=1e9)
    found = bound([matmul], 4, 2, fast_memory)
    assert found.images_per_s == pytest.approx(1.0)  # 2 x 1000 operations an image
    assert found.arithmetic == 1.0

    slow_memory = PeakRates(flops_per_s=1e9, bytes_per_s=320)
    found = bound([matmul], 4, 2, slow_memory)
    assert found.images_per_s == pytest.approx(4.0)  # (30 * 4 + 40) elements of 2 bytes
    assert found.arithmetic == 0.0
    assert bound([matmul], 4, 2, slow_memory, training=True).images_per_s == pytest.approx(4 / 3)


def test_bound_adds_products_up():
    rates = PeakRates(flops_per_s=2, bytes_per_s=1)
    found = bound([MatMul(3, 0, 0), MatMul(0, 1, 0)], 1, 1, rates)
    assert found.images_per_s == pytest.approx(1 / 4)
    assert found.arithmetic == pytest.approx(3 / 4)
