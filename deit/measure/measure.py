"""From names to results: count each network, then time each comparison in turns."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from deit.measure.bench_model import BenchModel, is_out_of_memory, release
from deit.measure.flops import MatMul, count_flops
from deit.measure.hardware import available_memory
from deit.measure.networks import FOLDED, SYMMETRIZED, build, has_asym_feats
from deit.measure.roofline import TRAINING, PeakRates, bound
from deit.measure.timing import alternate
from deit.models.inputs import input_channels
from deit.models.published import twin_of

DEFAULT_BATCH = 64
# Unless a batch size is asked for, a CPU gets one that its matrix rate does in so many seconds.
CPU_SECONDS = 4.0
# Of inference: what the largest product reads and writes, and as much again beside it. Of training:
# every product keeps its operand, its result and their gradients.
COPIES = 2
# What of a network is compared with its twin, and what tables call it.
RATIOS = {"gflops": "FLOPs", "images_per_s": "throughput", "train_images_per_s": "training",
          "peak_memory_mb": "memory"}  # fmt: skip


@dataclass
class Result:
    """What is known of a network; None where it was not measured. Rates are medians.

    The fields, but for `matmuls`, are the columns of the CSV file, and what JSON says.

    Attributes:
        params: trainable parameters: index tensors and fixed zeros are none.
        gflops: billions of FLOPs of one image.
        spread, train_spread: of the rates, see `Timing.spread`.
        bound_images_per_s, bound_by_arithmetic: see `roofline.bound`.
        notes: what a reader must know of these numbers.
        matmuls: see `count_flops`.
    """

    model: str
    params: int
    gflops: float | None
    images_per_s: float | None = None
    train_images_per_s: float | None = None
    peak_memory_mb: float | None = None
    twin: str | None = None
    batch_size: int | None = None
    spread: float | None = None
    train_spread: float | None = None
    train_peak_memory_mb: float | None = None
    bound_images_per_s: float | None = None
    bound_by_arithmetic: float | None = None
    train_bound_images_per_s: float | None = None
    notes: list[str] = field(default_factory=list)
    matmuls: list[MatMul] = field(default_factory=list)

    def ratios(self, twin: Result | None) -> dict[str, float | None]:
        """Ours over the twin's; None where either is missing."""
        pairs = {name: (getattr(self, name), getattr(twin, name, None)) for name in RATIOS}
        return {
            name: None if ours is None or not theirs else ours / theirs
            for name, (ours, theirs) in pairs.items()
        }


def count(name: str, args: Namespace) -> Result:
    """Parameters, FLOPs and matrix products of a network, without building it in memory.

    Of a folded network the FLOPs are left open, and the rest is that of the unfolded one.
    """
    if name.endswith(FOLDED):  # what is in it is known once it is built
        unfolded = count(name.removesuffix(FOLDED), args)
        return replace(unfolded, model=name, gflops=None, notes=[])
    model, size = build(name, args.img_size, args.arguments, device="meta")
    image = torch.empty(1, input_channels(model), size, size, device="meta")
    counted, twin = count_flops(model, image), twin_of(name)
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = Result(name, params, counted.total / 1e9, twin=twin, matmuls=counted.matmuls)
    if args.arguments.get(SYMMETRIZED) and twin and not has_asym_feats(name):
        result.notes.append("--symmetrized-asym-feats has no effect: its head sees all features")
    if counted.uncounted:
        listed = ", ".join(f"{name} ({n})" for name, n in sorted(counted.uncounted.items()))
        result.notes.append(f"FLOPs without these operators: {listed}")
    return result


def measure(
    members: Sequence[Result],
    args: Namespace,
    rates: PeakRates,
    on_step: Callable[[str], None] = lambda text: None,
) -> None:
    """Time the networks of a comparison in turns and fill in their results and bounds.

    Args:
        on_step: called with a word on what is done next.
    """
    batch, reason = first_batch(members, args, rates)
    while batch:
        try:
            _time(members, args, batch, on_step)
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            batch, reason = batch // 2, "memory does not hold more"
        finally:
            release()
    wanted = args.batch_size or DEFAULT_BATCH
    for result in members:
        if not batch:
            result.notes.append("not timed: memory does not hold a batch of one")
            continue
        if batch != wanted:
            result.notes.append(f"batch {batch} in place of {wanted}: {reason}")
        best, arithmetic = bound(result.matmuls, batch, args.dtype.itemsize, rates)
        result.bound_images_per_s, result.bound_by_arithmetic = best, arithmetic
        result.train_bound_images_per_s = best / TRAINING


def first_batch(members: Sequence[Result], args: Namespace, rates: PeakRates) -> tuple[int, str]:
    """The batch size to begin with, and why it is not the wanted one.

    On a CPU running out of memory may end the process, so the need is estimated beforehand.
    """
    batch, reason = args.batch_size or DEFAULT_BATCH, ""
    if args.device.type != "cpu":
        return batch, reason
    if args.batch_size is None:
        flops = 2 * max(sum(m.multiply_adds for m in result.matmuls) for result in members)
        while batch > 1 and flops * batch / rates.flops_per_s > CPU_SECONDS:
            batch, reason = batch // 2, "this processor would take long (give --batch-size)"
    available = available_memory()
    while available is not None and batch > 1 and _need(members, batch, args) > available:
        batch, reason = batch // 2, "memory does not hold more"
    return batch, reason


def _need(members: Sequence[Result], batch: int, args: Namespace) -> int:
    """A rough number of bytes for all members, with one of them at work."""
    weights = sum(result.params for result in members) * args.storage.itemsize
    if args.train:  # weights, gradients and two moments
        weights *= 4
    together = sum if args.train else max
    activations = max(together(m.moved for m in result.matmuls) for result in members)
    return weights + COPIES * batch * activations * args.dtype.itemsize


def _time(
    members: Sequence[Result], args: Namespace, batch: int, on_step: Callable[[str], None]
) -> None:
    networks: dict[str, BenchModel] = {}
    peaks = {}
    for result in members:
        on_step(f"{result.model}: warming up")
        networks[result.model] = BenchModel(result.model, batch, args)
        peaks[result.model] = networks[result.model].warm_up()
    steps = {f"{name}: inference": network.infer for name, network in networks.items()}
    timings = alternate(steps, args.device, args.min_time, on_step)
    if args.train:
        steps = {f"{name}: training": network.train_step for name, network in networks.items()}
        for network in networks.values():
            network.model.train()
        timings |= alternate(steps, args.device, args.min_time, on_step)
    for result in members:
        result.batch_size, timing = batch, timings[f"{result.model}: inference"]
        result.peak_memory_mb, result.train_peak_memory_mb = peaks[result.model]
        result.images_per_s, result.spread = batch / timing.median, timing.spread
        if args.train:
            timing = timings[f"{result.model}: training"]
            result.train_images_per_s, result.train_spread = batch / timing.median, timing.spread
