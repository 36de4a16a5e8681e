"""The exponential moving average of a network's weights.

Unlike timm's, it builds no state dict at an update, takes a process's own part of what is sharded,
and waits for no copy to the host. Unlike torch's, it copies integers.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class ModelEma:
    """Keeps `average = decay * average + (1 - decay) * weight` beside a training network.

    An average in host memory takes each update's weights in at the next update, or at `flush`, so
    that nothing waits for the copies.

    Args:
        model: the network, neither wrapped nor sharded; it is copied.
        decay: share of the old average that remains at an update, from 0 to 1.
        on_host: whether the average lives in host memory, wherever the weights are.
    """

    def __init__(self, model: nn.Module, decay: float, on_host: bool = False) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        if on_host:
            self.module.cpu()
        self.decay = decay
        self.on_host = on_host
        self._of: nn.Module | None = None
        self._waiting = False
        self._event: torch.cuda.Event | None = None

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model`, which has the structure of the one that was copied.

        Its tensors are looked up at the first update, and must stay the same objects.
        """
        self.flush()
        if self._of is not model:
            self._look_up(model)
        self._waiting = True
        if not self.on_host:
            self.flush()
            return
        torch._foreach_copy_(self._current, self._weights, non_blocking=self._event is not None)
        if self._event is not None:
            self._event.record()

    @torch.no_grad()
    def flush(self) -> None:
        """Take in the weights that are still on their way to the host."""
        if not self._waiting:
            return
        self._waiting = False
        if self._event is not None:
            self._event.synchronize()
        pairs = list(zip(self._averages, self._current, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        others = [pair for pair in pairs if not pair[0].is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [w for _, w in floats], 1.0 - self.decay)
        if others:
            torch._foreach_copy_([a for a, _ in others], [w for _, w in others])

    def _look_up(self, model: nn.Module) -> None:
        """List the tensors of both networks, and make room on the host for copies."""
        self._of = model
        self._averages, self._weights = _tensors(self.module), _tensors(model)
        self._current = self._weights
        if self.on_host:
            pin = self._weights[0].is_cuda
            self._event = torch.cuda.Event() if pin else None
            self._current = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=pin) for t in self._weights
            ]


def _tensors(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers; of sharded ones this process's part."""
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers())]
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
