"""The exponential moving average of a network's weights.

Unlike timm's, it works on parameters and buffers and not on `state_dict()`: the state dict of a
network here is a published format, whose tensors may be assembled from what the layers hold, and an
average written into such a copy would be lost.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class ModelEma:
    """Keeps `average = decay * average + (1 - decay) * weight` beside a training network.

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

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model`, which has the structure of the one that was copied."""
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        for own, other in zip(_tensors(self.module), _tensors(model), strict=True):
            value = other.detach().to(own.device)
            if own.is_floating_point():
                averaged.append(own)
                current.append(value)
            else:
                own.copy_(value)
        torch._foreach_lerp_(averaged, current, 1.0 - self.decay)


def _tensors(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers; of sharded ones this process's part."""
    tensors = [*model.parameters(), *model.buffers()]
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
