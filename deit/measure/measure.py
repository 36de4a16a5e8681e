"""From names to results: count each network, then time each comparison in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from deit.measure.bench_model import BenchModel, Settings, is_out_of_memory, release
from deit.measure.flops import MatMul, count_flops
from deit.measure.hardware import available_memory
from deit.measure.networks import FOLDED, SYMMETRIZED, has_asym_feats, on_meta
from deit.measure.roofline import Bound, PeakRates, bound
from deit.measure.timing import alternate
from deit.models.published import twin_of

__all__ = ["Result", "count", "first_batch", "measure"]

DEFAULT_BATCH = 64
# Unless a batch size is asked for, a CPU gets one that its matrix rate does in so many seconds.
CPU_SECONDS = 4.0
# Of inference: what the largest product reads and writes, and as much again beside it. Of training:
# every product keeps its operand, its result and their gradients.
COPIES = 2


@dataclass
class Result:
    """What is known of a network; None where it was not measured. Rates are medians.

    Attributes:
        params: trainable parameters: index tensors and fixed zeros are none.
        gflops: billions of FLOPs of one image.
        spread, train_spread: of the rates, see `Timing.spread`.
        matmuls: see `count_flops`.
        notes: what a reader must know of these numbers.
    """

    model: str
    params: int
    gflops: float | None
    matmuls: list[MatMul]
    twin: str | None = None
    batch_size: int | None = None
    images_per_s: float | None = None
    spread: float | None = None
    train_images_per_s: float | None = None
    train_spread: float | None = None
    peak_memory_mb: float | None = None
    train_peak_memory_mb: float | None = None
    bound: Bound | None = None
    train_bound: Bound | None = None
    notes: list[str] = field(default_factory=list)

    def ratios(self, twin: Result | None) -> dict[str, float | None]:
        """Ours over the twin's; None where either is missing."""
        found: dict[str, float | None] = {}
        for name in ("gflops", "images_per_s", "train_images_per_s", "peak_memory_mb"):
            ours, theirs = getattr(self, name), getattr(twin, name, None)
            found[name] = None if ours is None or not theirs else ours / theirs
        return found


def count(name: str, settings: Settings) -> Result:
    """Parameters, FLOPs and matrix products of a network, without building it in memory.

    Of a folded network the FLOPs are left open, and the rest is that of the unfolded one.
    """
    if name.endswith(FOLDED):  # what is in it is known once it is built
        unfolded = count(name.removesuffix(FOLDED), settings)
        return replace(unfolded, model=name, gflops=None, notes=[])
    model, image = on_meta(name, settings.img_size, settings.arguments)
    counted = count_flops(model, image)
    notes = []
    if settings.arguments.get(SYMMETRIZED) and twin_of(name) and not has_asym_feats(name):
        notes.append("--symmetrized-asym-feats has no effect: its head sees all features")
    if counted.uncounted:
        listed = ", ".join(f"{name} ({n})" for name, n in sorted(counted.uncounted.items()))
        notes.append(f"FLOPs without these operators: {listed}")
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    gflops = counted.total / 1e9
    return Result(name, params, gflops, counted.matmuls, twin=twin_of(name), notes=notes)


def measure(
    members: Sequence[Result],
    settings: Settings,
    rates: PeakRates,
    on_step: Callable[[str], None] = lambda text: None,
) -> None:
    """Time the networks of a comparison in turns and fill in their results and bounds.

    Args:
        on_step: called with a word on what is done next.
    """
    batch, reason = first_batch(members, settings, rates)
    while batch:
        try:
            _measure(members, settings, batch, on_step)
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            batch, reason = batch // 2, "memory does not hold more"
        finally:
            release(settings.device)
    wanted = settings.batch_size or DEFAULT_BATCH
    for result in members:
        if not batch:
            result.notes.append("not timed: memory does not hold a batch of one")
            continue
        if batch != wanted:
            result.notes.append(f"batch {batch} in place of {wanted}: {reason}")
        of_batch = partial(bound, result.matmuls, batch, settings.dtype.itemsize, rates)
        result.bound, result.train_bound = of_batch(), of_batch(training=True)


def first_batch(members: Sequence[Result], settings: Settings, rates: PeakRates) -> tuple[int, str]:
    """The batch size to begin with, and why it is not the wanted one.

    On a CPU running out of memory may end the process, so the need is estimated beforehand.
    """
    batch, reason = settings.batch_size or DEFAULT_BATCH, ""
    if settings.device.type != "cpu":
        return batch, reason
    if settings.batch_size is None:
        flops = 2 * max(sum(m.multiply_adds for m in result.matmuls) for result in members)
        while batch > 1 and flops * batch / rates.flops_per_s > CPU_SECONDS:
            batch, reason = batch // 2, "this processor would take long (give --batch-size)"
    available = available_memory()
    while available is not None and batch > 1 and _need(members, batch, settings) > available:
        batch, reason = batch // 2, "memory does not hold more"
    return batch, reason


def _need(members: Sequence[Result], batch: int, settings: Settings) -> int:
    """A rough number of bytes for all members, with one of them at work."""
    weights = sum(result.params for result in members) * settings.storage.itemsize
    if settings.train:  # weights, gradients and two moments
        weights *= 4
    together = sum if settings.train else max
    activations = max(together(m.moved for m in result.matmuls) for result in members)
    return weights + COPIES * batch * activations * settings.dtype.itemsize


def _measure(
    members: Sequence[Result], settings: Settings, batch: int, on_step: Callable[[str], None]
) -> None:
    models: dict[str, BenchModel] = {}
    for result in members:
        on_step(f"{result.model}: warming up")
        models[result.model] = BenchModel(result.model, batch, settings)
        models[result.model].warm_up()
    time = partial(alternate, device=settings.device, min_time=settings.min_time)
    timings = time(
        {name: model.infer for name, model in models.items()},
        on_sample=lambda name: on_step(f"{name}: inference"),
    )
    train_timings = {}
    if settings.train:
        for model in models.values():
            model.model.train()
        train_timings = time(
            {name: model.train_step for name, model in models.items()},
            on_sample=lambda name: on_step(f"{name}: training"),
        )
    for result in members:
        model, timing = models[result.model], timings[result.model]
        result.batch_size = batch
        result.images_per_s, result.spread = batch / timing.median, timing.spread
        result.peak_memory_mb = _megabytes(model.peak_memory)
        if settings.train:
            timing = train_timings[result.model]
            result.train_images_per_s = batch / timing.median
            result.train_spread = timing.spread
            result.train_peak_memory_mb = _megabytes(model.train_peak_memory)


def _megabytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20
