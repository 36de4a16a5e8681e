"""From names to results: count each network, then time each group of twins in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from deit.measure.flops import count_flops
from deit.measure.formula import closed_form
from deit.measure.hardware import available_memory
from deit.measure.networks import FOLDED, Group, has_asym_feats, on_meta, trainable
from deit.measure.published import twin_of
from deit.measure.roofline import Bound, Ceilings, Product, bound, matrix_products
from deit.measure.subject import Settings, Subject, is_out_of_memory, release
from deit.measure.timing import alternate

__all__ = ["Result", "add_bounds", "count", "measure_group"]

DEFAULT_BATCH = 64
# Unless a batch size is asked for, a CPU gets one that its matrix rate does in so many seconds.
CPU_SECONDS = 4.0
# Of inference: what the largest product reads and writes, and as much again beside it. Of training:
# every product keeps its operand, its result and their gradients.
INFERENCE_COPIES, TRAINING_COPIES = 2, 2


@dataclass
class Result:
    """What is known of a network; None where it was not measured. Rates are medians.

    Attributes:
        params: trainable parameters.
        gflops: billions of FLOPs of one image.
        spread, train_spread: of the rates, see `Timing.spread`.
        products: see `matrix_products`.
        notes: what a reader must know of these numbers.
    """

    model: str
    params: int
    gflops: float | None
    products: list[Product]
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
        names = ("gflops", "images_per_s", "train_images_per_s", "peak_memory_mb")
        return {name: _ratio(getattr(self, name), getattr(twin, name, None)) for name in names}


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or not theirs else ours / theirs


def count(name: str, settings: Settings, *, with_products: bool = True) -> Result:
    """Parameters, FLOPs and matrix products of a network, without building it in memory.

    Of a folded network the FLOPs are left open, and the rest is that of the unfolded one.
    FLOPs are fvcore's count; where fvcore is not installed, the closed formula. The products are
    for bounds and batch sizes, and not needed for a network that is not going to be timed.
    """
    if name.endswith(FOLDED):  # what is in it is known once it is built
        unfolded = count(name.removesuffix(FOLDED), settings, with_products=with_products)
        return replace(unfolded, model=name, gflops=None, notes=[])
    symmetrized = settings.symmetrized_asym_feats
    model, image = on_meta(
        name, settings.img_size, symmetrized=symmetrized, arguments=settings.arguments
    )
    notes = []
    if symmetrized and twin_of(name) and not has_asym_feats(name):
        notes.append("--symmetrized-asym-feats has no effect: its head sees all features")
    try:
        counted = count_flops(model, image)
    except ImportError:
        flops = closed_form(model, image.shape[-1])
        notes.append("FLOPs by the closed formula: fvcore is not installed")
        if flops is None:
            notes[-1] = "no FLOPs: fvcore is not installed, and there is no formula"
    else:
        flops = counted.total
        if counted.uncounted:
            listed = ", ".join(f"{name} ({n})" for name, n in sorted(counted.uncounted.items()))
            notes.append(f"FLOPs without these operators: {listed}")
    return Result(
        name,
        trainable(model),
        None if flops is None else flops / 1e9,
        matrix_products(model, image) if with_products else [],
        twin=twin_of(name),
        notes=notes,
    )


def measure_group(
    group: Group,
    results: dict[str, Result],
    settings: Settings,
    batch_size: int | None,
    min_time: float,
    ceilings: Ceilings,
    on_step: Callable[[str], None] = lambda text: None,
) -> None:
    """Time the networks of a group in turns and fill in their `results`.

    Args:
        batch_size: None for the default, 64, less on a CPU where that takes long.
        on_step: called with a word on what is done next.
    """
    members = [results[name] for name in group.names]
    batch, reason = first_batch(members, settings, batch_size, ceilings)
    while batch:
        try:
            _measure(members, settings, batch, min_time, on_step)
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            batch, reason = batch // 2, "memory does not hold more"
        finally:
            release(settings.device)
    wanted = batch_size or DEFAULT_BATCH
    for result in members:
        if not batch:
            result.notes.append("not timed: memory does not hold a batch of one")
        elif batch != wanted:
            result.notes.append(f"batch {batch} in place of {wanted}: {reason}")


def first_batch(
    members: Sequence[Result], settings: Settings, wanted: int | None, ceilings: Ceilings
) -> tuple[int, str]:
    """The batch size to begin with, and why it is not the wanted one.

    On a CPU running out of memory may end the process, so the need is estimated beforehand.
    """
    batch, reason = wanted or DEFAULT_BATCH, ""
    if settings.device.type != "cpu":
        return batch, reason
    multiply_adds = max(sum(p.multiply_adds for p in result.products) for result in members)
    if wanted is None:
        while batch > 1 and 2 * multiply_adds * batch / ceilings.flops_per_s > CPU_SECONDS:
            batch, reason = batch // 2, "this processor would take long (give --batch-size)"
    available = available_memory()
    while available is not None and batch > 1 and _need(members, batch, settings) > available:
        batch, reason = batch // 2, "memory does not hold more"
    return batch, reason


def _need(members: Sequence[Result], batch: int, settings: Settings) -> int:
    """A rough number of bytes for all members, with one of them at work."""
    size = settings.dtype.itemsize
    if settings.train:  # weights, gradients and two moments
        weights = sum(4 * result.params * settings.storage.itemsize for result in members)
        activations = max(sum(p.moved for p in result.products) for result in members)
        return weights + TRAINING_COPIES * batch * activations * size
    weights = sum(result.params * settings.storage.itemsize for result in members)
    activations = max(max(p.moved for p in result.products) for result in members)
    return weights + INFERENCE_COPIES * batch * activations * size


def _measure(
    members: Sequence[Result],
    settings: Settings,
    batch: int,
    min_time: float,
    on_step: Callable[[str], None],
) -> None:
    subjects: dict[str, Subject] = {}
    for result in members:
        on_step(f"{result.model}: warming up")
        subject = subjects[result.model] = Subject(result.model, batch, settings)
        subject.warm_up()
    on_sample = partial(_announce, on_step, "inference")
    timings = alternate(
        {name: subject.infer for name, subject in subjects.items()},
        settings.device,
        min_time,
        on_sample,
    )
    train_timings = {}
    if settings.train:
        for subject in subjects.values():
            subject.model.train()
        train_timings = alternate(
            {name: subject.train_step for name, subject in subjects.items()},
            settings.device,
            min_time,
            partial(_announce, on_step, "training"),
        )
    for result in members:
        subject, timing = subjects[result.model], timings[result.model]
        result.batch_size = batch
        result.images_per_s, result.spread = batch / timing.median, timing.spread
        result.peak_memory_mb = _megabytes(subject.peak_memory)
        result.train_peak_memory_mb = _megabytes(subject.train_peak_memory)
        if result.model in train_timings:
            timing = train_timings[result.model]
            result.train_images_per_s = batch / timing.median
            result.train_spread = timing.spread


def _announce(on_step: Callable[[str], None], what: str, name: str) -> None:
    on_step(f"{name}: {what}")


def _megabytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def add_bounds(result: Result, dtype: torch.dtype, ceilings: Ceilings) -> None:
    """Fill in the roofline bounds for the batch size that was measured."""
    if result.batch_size is None:
        return
    of_batch = partial(bound, result.products, result.batch_size, dtype.itemsize, ceilings)
    result.bound = of_batch()
    result.train_bound = of_batch(training=True)
