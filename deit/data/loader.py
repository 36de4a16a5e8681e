"""Loaders: workers make uint8 batches, the device turns them into normalised floats.

A training loader is ONE stream over all epochs: workers start once, and the first batches of an
epoch are under way while the last ones of the epoch before are trained on. Every sample is seeded
by its position (`deit.data.stream`), so that 0, 2 or 20 workers give the same bits. No global
random state of the main process is touched.

Random erasing acts on normalised images, and so on the device. timm's loader draws it there, image
by image, from the generators of the process. Here the worker draws it by timm's own code, under the
seed of the sample, and sends the pixels that change: on the device a batch takes one assignment.
The distribution is timm's; which part of which image is erased differs from a run of timm's, and is
the same on every device.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from deit.data.images import ImageDataset
from deit.data.stream import (
    EpochStream,
    Sample,
    preserve_generators,
    sample_seeds,
    seed_everything,
)
from deit.errors import UserError

# Seconds in which the threads of torch.distributed come to rest after a collective.
REST = 0.1
# Signals that mean the whole job: the main process acts on them, workers do not.
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class RawBatch:
    """What a worker sends."""

    images: Tensor
    """uint8 (B, 3, H, W)"""
    targets: Tensor
    """int64 (B,)"""
    erased: Tensor | None = None
    """Which of the B H W pixels random erasing replaces: int64 (E,), each of them once."""
    noise: Tensor | None = None
    """What it puts there: float32 (E, 3), normalised values."""

    def pin_memory(self) -> RawBatch:
        """Called by the DataLoader's pinning thread."""
        tensors = (self.images, self.targets, self.erased, self.noise)
        return RawBatch(*(None if tensor is None else tensor.pin_memory() for tensor in tensors))


@dataclass
class Failure:
    """A UserError on its way out of a worker: raised there, its text would hold a traceback."""

    message: str


def _stack(images: list[Tensor]) -> Tensor:
    """uint8 images (3, H, W) as one batch (B, 3, H, W), in shared memory if this is a worker.

    PIL's images are (H, W, 3) in memory. The batch keeps that layout, so that an image is copied in
    one run of bytes; the conversion to float on the device reorders it.
    """
    channels, height, width = images[0].shape
    out = torch.empty(0, dtype=torch.uint8)
    if get_worker_info() is not None:
        count = len(images) * channels * height * width
        out = out.new(out._typed_storage()._new_shared(count, device="cpu"))
    out = out.resize_(len(images), height, width, channels)
    for target, image in zip(out, images, strict=True):
        target.copy_(image.permute(1, 2, 0))
    return out.permute(0, 3, 1, 2)


def build_erasing(probability: float, mode: str, count: int) -> RandomErasing | None:
    """timm's random erasing of at most `count` parts (None for probability 0), on the CPU."""
    if mode not in ("const", "rand", "pixel"):
        raise UserError(f"unknown random-erasing mode {mode!r}: pixel, rand or const")
    if probability <= 0:
        return None
    return RandomErasing(probability, mode=mode, max_count=count, device="cpu")


def draw_erasing(
    erasing: RandomErasing, shape: Sequence[int], seeds: Sequence[int | None]
) -> tuple[Tensor, Tensor]:
    """`erased` and `noise` of a RawBatch of images of `shape` (3, H, W), one seed an image.

    An image without a seed stays whole.
    """
    area = shape[1] * shape[2]
    erased, noise = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, shape[0])]
    for number, seed in enumerate(seeds):
        if seed is not None:
            seed_everything(seed)
            canvas = erasing(torch.full(shape, torch.nan)).flatten(1)
            (pixels,) = torch.where(~canvas[0].isnan())
            erased.append(pixels + number * area)
            noise.append(canvas[:, pixels].T)
    return torch.cat(erased), torch.cat(noise)


def erase(images: Tensor, erased: Tensor, noise: Tensor) -> None:
    """Put `noise` into the pixels `erased` of normalised `images` (B, 3, H, W), in place."""
    area = images.shape[2] * images.shape[3]
    images.flatten(2)[erased // area, :, erased % area] = noise


class BatchDataset(Dataset):
    """Makes whole batches (`DataLoader` hands `__getitems__` what the batch sampler yields).

    For training, items are `Sample`s and every image is made under its own seed; for evaluation
    they are indices. Positions that are multiples of `first_clean` are not erased (0: none).
    """

    def __init__(
        self,
        images: ImageDataset,
        seed: int | None = None,
        erasing: RandomErasing | None = None,
        first_clean: int = 0,
    ) -> None:
        self.images = images
        self.seed = seed
        self.erasing = erasing
        self.first_clean = first_clean

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, items: list[Sample] | list[int]) -> RawBatch | Failure:
        try:
            if self.seed is None:
                return self._collate([self.images[index] for index in items])
            with preserve_generators() if get_worker_info() is None else nullcontext():
                return self._seeded(items)
        except UserError as error:
            return Failure(str(error))

    def _seeded(self, items: list[Sample]) -> RawBatch:
        seeds = [sample_seeds(self.seed, item.epoch, item.position) for item in items]
        made = []
        for item, seed in zip(items, seeds, strict=True):
            seed_everything(seed.transform)
            made.append(self.images[item.index])
        batch = self._collate(made)
        if self.erasing is not None:
            clean = [self.first_clean and item.position % self.first_clean == 0 for item in items]
            drawn = [None if c else s.erasing for c, s in zip(clean, seeds, strict=True)]
            batch.erased, batch.noise = draw_erasing(self.erasing, batch.images.shape[1:], drawn)
        return batch

    def _collate(self, made: list[tuple[Tensor, int]]) -> RawBatch:
        return RawBatch(
            _stack([image for image, _ in made]),
            torch.tensor([target for _, target in made], dtype=torch.int64),
        )


def _identity(batch: RawBatch | Failure) -> RawBatch | Failure:
    return batch


def _init_worker(stopping: ctypes.c_bool, worker_id: int) -> None:
    """Leave signals to the main process, which saves a checkpoint and then stops its workers.

    Ctrl-C and cluster managers signal all processes of a job. But SIGTERM is also how
    multiprocessing ends a worker that hangs, so that it counts once the loader is `stopping`.
    """

    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        if stopping.value:
            os._exit(0)

    for number in JOB_SIGNALS:
        signal.signal(number, on_sigterm if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)  # see hold_job_signals


def is_worker_death(error: BaseException) -> bool:
    """Whether `error` says that a worker was killed.

    Torch reports it from a SIGCHLD handler, so that it can come up in the middle of any statement
    of the main process, not only in the loader. A main process that was just receiving a batch
    finds the connection closed before that.
    """
    if isinstance(error, (ConnectionError, EOFError)):
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        return any("multiprocessing" in Path(file).parts for file in files)
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def worker_death(error: BaseException) -> UserError:
    """The one line to print for it. No report of torch's can come after this call."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not isinstance(error, RuntimeError):
        error = f"DataLoader worker (pid unknown) is gone: {error}."
    return UserError(
        f"{error} Often the machine ran out of memory (fewer --num-workers help) or shared memory "
        "(in a container: a larger /dev/shm)."
    )


def let_threads_rest() -> None:
    """Call before forking workers: among several processes, wait for threads that end a collective.

    Such a thread enters Python to drop tensors. Up to Python 3.11 a process that is forked while it
    does hangs in `os.fork` for ever: the child takes the lock on the list of threads before it is
    made anew.
    """
    if sys.version_info < (3, 12) and dist.is_available() and dist.is_initialized():
        time.sleep(REST)


@contextmanager
def hold_job_signals() -> Iterator[None]:
    """Hold JOB_SIGNALS back while workers are started; `_init_worker` lets them through.

    A worker is born with what its parent holds back. Else a signal to the whole job would kill the
    workers that are not set up yet.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _clear_frames(error: BaseException | None) -> None:
    """Forget what variables held there: workers live on for as long as anything holds them."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class DeviceLoader:
    """Yields (images float32 (B, 3, H, W) normalised, targets int64 (B,)), both on `device`.

    On CUDA the next batch is copied and normalised on a side stream while the current one is in
    use, as in timm's PrefetchLoader. `batches` yields RawBatches. A Failure among them is raised as
    UserError. A pass that fails ends the workers and closes the loader.
    """

    def __init__(
        self,
        batches: DataLoader,
        *,
        stopping: ctypes.c_bool,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self._batches: DataLoader | None = batches
        self._running: Iterator | None = None
        self._forked = batches.num_workers == 0
        self._stopping = stopping
        self.device = device
        self._compute = device if device.type == "cuda" else torch.device("cpu")
        self._mean, self._std = (
            torch.tensor([255 * value for value in values], device=self._compute).view(1, -1, 1, 1)
            for values in (mean, std)
        )
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # at exit this runs before multiprocessing terminates the workers and waits for them
        weakref.finalize(self, setattr, stopping, "value", True)

    def __len__(self) -> int:
        """The number of batches of one pass."""
        assert self._batches is not None, "the loader is closed"
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._batches is not None, "the loader is closed"
        self._running = self._on_device() if self._stream is None else self._ahead_on_cuda()
        return self._running

    def close(self) -> None:
        """End the pass under way, if any, and the workers."""
        self._stopping.value = True
        if self._running is not None:
            self._running.close()
        self._running = self._batches = None

    def _raw(self) -> Iterator[RawBatch]:
        if not self._forked:
            let_threads_rest()
        starts_workers = not (self._forked and self._batches.persistent_workers)
        self._forked = True
        batches = None
        try:
            with hold_job_signals() if starts_workers else nullcontext():
                batches = iter(self._batches)
            for batch in batches:
                if isinstance(batch, Failure):
                    raise UserError(batch.message)
                yield batch
        except Exception as error:
            self._stopping.value = True
            is_death = is_worker_death(error)
            if self._batches.num_workers > 0:
                _clear_frames(error)
            self._batches = None  # a DataLoader holds an iterator of persistent workers
            if is_death:
                raise worker_death(error) from error
            raise
        finally:
            batches = None

    def _on_device(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._raw():
            yield self._finish(batch)

    def _ahead_on_cuda(self) -> Iterator[tuple[Tensor, Tensor]]:
        ready = None
        for batch in self._raw():
            # memory that the consumer freed may be reused below: wait for the work queued on it
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                coming = self._finish(batch)
            if ready is not None:
                yield ready
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            ready = coming
        if ready is not None:
            yield ready

    def _finish(self, batch: RawBatch) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self._compute, non_blocking=True)
        images = images.to(torch.float32, memory_format=torch.contiguous_format)
        images = images.sub_(self._mean).div_(self._std)
        if batch.erased is not None:
            parts = (batch.erased, batch.noise)
            erase(images, *(part.to(self._compute, non_blocking=True) for part in parts))
        targets = batch.targets.to(self.device, non_blocking=True)
        return images.to(self.device), targets


class TrainLoader(DeviceLoader):
    """One pass over all epochs from the start on; `steps_per_epoch` of its batches are an epoch."""

    def __init__(self, stream: EpochStream, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps_per_epoch = stream.steps_per_epoch


def build_train_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    epochs: int,
    device: torch.device | str,
    start_epoch: int = 0,
    start_step: int = 0,
    seed: int = 0,
    world_size: int = 1,
    rank: int = 0,
    repeats: int = 1,
    num_workers: int = 0,
    pin_memory: bool = True,
    re_prob: float = 0.0,
    re_mode: str = "pixel",
    re_count: int = 1,
    resplit: bool = False,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> TrainLoader:
    """All batches of one process from (start_epoch, start_step) to the end of epoch `epochs` - 1.

    `batch_size` is that of one process; `repeats` > 1 is repeated augmentation. With `resplit`
    random erasing spares the first of the `repeats` copies of each image, so that one of them is
    whole (without repeated augmentation it spares none).

    Raises UserError if `dataset` is smaller than one global batch and, while iterating, for a
    damaged image, which it names.
    """
    device = torch.device(device)
    stream = EpochStream(
        len(dataset),
        batch_size=batch_size,
        epochs=epochs,
        start_epoch=start_epoch,
        start_step=start_step,
        seed=seed,
        world_size=world_size,
        rank=rank,
        repeats=repeats,
    )
    source = BatchDataset(
        dataset,
        seed,
        erasing=build_erasing(re_prob, re_mode, re_count),
        first_clean=repeats if resplit and repeats > 1 else 0,
    )
    stopping = multiprocessing.RawValue(ctypes.c_bool, False)
    loader = _data_loader(source, stream, num_workers, pin_memory, device, stopping, False)
    return TrainLoader(stream, loader, stopping=stopping, device=device, mean=mean, std=std)


def build_eval_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    device: torch.device | str,
    world_size: int = 1,
    rank: int = 0,
    num_workers: int = 0,
    pin_memory: bool = True,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> DeviceLoader:
    """Images rank, rank + world_size, ... in order: over all ranks every image exactly once.

    Nothing is padded or dropped, so that ranks may get different numbers of batches, even none.
    """
    device = torch.device(device)
    indices = range(rank, len(dataset), world_size)
    batches = [
        list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)
    ]
    source = BatchDataset(dataset)
    stopping = multiprocessing.RawValue(ctypes.c_bool, False)
    loader = _data_loader(source, batches, num_workers, pin_memory, device, stopping, True)
    return DeviceLoader(loader, stopping=stopping, device=device, mean=mean, std=std)


def _data_loader(
    source: BatchDataset,
    batch_sampler: EpochStream | list[list[int]],
    num_workers: int,
    pin_memory: bool,
    device: torch.device,
    stopping: ctypes.c_bool,
    persistent: bool,
) -> DataLoader:
    return DataLoader(
        source,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        collate_fn=_identity,
        pin_memory=pin_memory and device.type == "cuda",
        worker_init_fn=partial(_init_worker, stopping),
        persistent_workers=persistent and num_workers > 0,
        generator=torch.Generator(),  # by default the DataLoader draws its seed from the global one
    )
