"""The exponential moving average of a network's weights.

Unlike timm's, it works on parameters and buffers and not on `state_dict()`: the state dict of a
network here is a published format, whose tensors may be assembled from what the layers hold, and an
average written into such a copy would be lost.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class ModelEma:
    """Keeps `average = decay * average + (1 - decay) * weight` beside a training network.

    An average that lives in host memory while the network does not takes each update's weights in
    at the next update, or at `flush`, so that nothing waits for the copies.

    Args:
        model: the network, neither wrapped nor sharded; it is copied.
        decay: share of the old average that remains at an update, from 0 to 1.
        device: where the average lives (None: beside the weights).
    """

    def __init__(
        self, model: nn.Module, decay: float, device: torch.device | str | None = None
    ) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.module.to(device)
        self.decay = decay
        self._of: nn.Module | None = None
        self._pairs: Pairs | None = None

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model`, which has the structure of the one that was copied.

        Its tensors are looked up at the first update, and must stay the same objects.
        """
        if self._pairs is None or self._of is not model:
            self.flush()
            self._of, self._pairs = model, Pairs(_tensors(self.module), _tensors(model))
        self.flush()
        self._pairs.fetch()
        if not self._pairs.copies:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Take in the weights that are still on their way to the host."""
        if self._pairs is not None:
            self._pairs.average(1.0 - self.decay)


class Pairs:
    """The tensors of an average and those of the network, in lists made once.

    Args:
        copies: whether to take the network's by way of copies (None: if it is on another device).
    """

    def __init__(
        self, own: Sequence[Tensor], other: Sequence[Tensor], copies: bool | None = None
    ) -> None:
        pairs = list(zip(own, (t.detach() for t in other), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        others = [pair for pair in pairs if not pair[0].is_floating_point()]
        self.averaged, self.current = [a for a, _ in floats], [b for _, b in floats]
        self.counts, self.current_counts = [a for a, _ in others], [b for _, b in others]
        self.copies = any(a.device != b.device for a, b in pairs) if copies is None else copies
        self.waiting = False
        self._event: torch.cuda.Event | None = None
        if self.copies:
            self._sources = [*self.current, *self.current_counts]
            pin = self._sources[0].is_cuda
            landed = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pin) for t in self._sources]
            self._landed = landed
            self.current, self.current_counts = landed[: len(floats)], landed[len(floats) :]
            self._event = torch.cuda.Event() if pin else None

    def fetch(self) -> None:
        """Start copying the network's tensors to where the average is, if that is elsewhere."""
        self.waiting = True
        if self.copies:
            torch._foreach_copy_(self._landed, self._sources, non_blocking=self._event is not None)
            if self._event is not None:
                self._event.record()

    def average(self, share: float) -> None:
        """Move the averages by `share` of the way to what was fetched last, once."""
        if not self.waiting:
            return
        self.waiting = False
        if self._event is not None:
            self._event.synchronize()
        torch._foreach_lerp_(self.averaged, self.current, share)
        if self.counts:
            torch._foreach_copy_(self.counts, self.current_counts)


def _tensors(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers; of sharded ones this process's part."""
    tensors = [*model.parameters(), *model.buffers()]
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
