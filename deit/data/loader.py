"""Loaders: workers make uint8 batches, the device turns them into normalised floats.

A training loader is ONE stream over all epochs: workers start once, and the first batches of an
epoch are under way while the last ones of the epoch before are trained on. Every sample is seeded
by its position (`deit.data.stream`), so that 0, 2 or 20 workers give the same bits. No global
random state of the main process is touched.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Iterator, Sequence

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader

from deit.data.batches import BatchDataset, RawBatch, WorkerError, erase
from deit.data.images import ImageDataset
from deit.data.stream import ResumableBatchSampler
from deit.data.workers import end_workers, start_pass, worker_death
from deit.errors import UserError


class DeviceLoader:
    """Yields (images float32 (B, 3, H, W) normalised, targets int64 (B,)), both on `device`.

    On CUDA the next batch is copied and normalised on a side stream while the current one is in
    use, as in timm's PrefetchLoader. `batches` yields RawBatches. A WorkerError among them is
    raised as UserError. Workers live from the first pass until `close`, or until a pass fails.
    """

    def __init__(
        self,
        batches: DataLoader,
        *,
        device: torch.device,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self._batches = batches
        self.device = device
        self._compute = device if device.type == "cuda" else torch.device("cpu")
        self._mean, self._std = (
            torch.tensor([255 * value for value in values], device=self._compute).view(1, -1, 1, 1)
            for values in (mean, std)
        )
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # registered after torch's own, it runs at exit while workers can still be asked to end
        atexit.register(weakref.finalize(self, end_workers, batches))

    def __len__(self) -> int:
        """The number of batches of one pass."""
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._on_device() if self._stream is None else self._ahead_on_cuda()

    def close(self) -> None:
        """End the workers, and so the pass under way, if any."""
        end_workers(self._batches)

    def _raw(self) -> Iterator[RawBatch]:
        try:
            for batch in start_pass(self._batches):
                if isinstance(batch, WorkerError):
                    raise UserError(batch.message)
                yield batch
        except Exception as error:
            death = worker_death(error)
            self.close()
            if death is not None:
                raise death from error
            raise

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


def build_train_loader(
    dataset: ImageDataset,
    sampler: ResumableBatchSampler,
    *,
    device: torch.device | str,
    num_workers: int = 0,
    pin_memory: bool = True,
    re_prob: float = 0.0,
    re_mode: str = "pixel",
    re_count: int = 1,
    resplit: bool = False,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> DeviceLoader:
    """All batches that `sampler` asks for, in one pass over all epochs.

    With `resplit` random erasing spares the first of the copies that repeated augmentation makes of
    each image, so that one of them is whole (without repeated augmentation it spares none).

    Raises UserError, while iterating, for a damaged image, which it names.
    """
    erasing = None
    if re_prob > 0:
        erasing = RandomErasing(re_prob, mode=re_mode, max_count=re_count, device="cpu")
    first_clean = sampler.repeats if resplit and sampler.repeats > 1 else 0
    source = BatchDataset(dataset, sampler.seed, erasing, first_clean)
    loader = _data_loader(source, sampler, num_workers, pin_memory, torch.device(device))
    return DeviceLoader(loader, device=torch.device(device), mean=mean, std=std)


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
    loader = _data_loader(source, batches, num_workers, pin_memory, device)
    return DeviceLoader(loader, device=device, mean=mean, std=std)


def _data_loader(
    source: BatchDataset,
    batch_sampler: ResumableBatchSampler | list[list[int]],
    num_workers: int,
    pin_memory: bool,
    device: torch.device,
) -> DataLoader:
    return DataLoader(
        source,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        collate_fn=_identity,  # the source makes batches
        pin_memory=pin_memory and device.type == "cuda",
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # by default the DataLoader draws its seed from the global one
    )


def _identity(batch: RawBatch | WorkerError) -> RawBatch | WorkerError:
    return batch
