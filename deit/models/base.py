"""What the convolutional and perceptron families share of timm's model interface: the classifier.

Both classify features that have been made invariant: they are pooled, normalised and mapped to
logits, unlike a transformer's class token, which is normalised before.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["HeadMixin", "Pool", "init_linear", "scale_classifier"]

Pool = Literal["", "avg"]


def init_linear(module: nn.Module) -> None:
    """Truncated normal, 0.02, for the weight of a linear layer; zero for its bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def scale_classifier(head: nn.Module, scale: float) -> None:
    """Multiply a classifier's initial weights; without a classifier do nothing."""
    if isinstance(head, nn.Linear):
        head.weight.mul_(scale)
        head.bias.mul_(scale)


class HeadMixin:
    """The classifier of a model and timm's methods about it, for subclasses of `nn.Module`.

    The model calls `_init_head` in its constructor, when its norm exists.
    """

    head: nn.Module
    head_hidden_size: int
    training: bool

    def _init_head(
        self,
        width: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        head_init_scale: float,
        **dd: Any,
    ) -> None:
        self.num_classes = num_classes
        self.global_pool = self._check_pool(global_pool)
        self.head_hidden_size = width
        self.head_init_scale = head_init_scale
        self.grad_checkpointing = False
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._classifier(num_classes, **dd)

    def _check_pool(self, pool: str) -> str:
        if pool not in ("", "avg"):
            raise ValueError(f"global_pool {pool!r} is not known: use 'avg', or '' for none")
        return pool

    def _classifier(self, num_classes: int, **dd: Any) -> nn.Module:
        if num_classes <= 0:
            return nn.Identity()
        return nn.Linear(self.head_hidden_size, num_classes, **dd)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond those of one dimension: none."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Pool | None = None) -> None:
        """Replace the classifier; 0 classes for none. `global_pool` changes the pooling."""
        parameter = next(self.parameters())
        if global_pool is not None:
            self.global_pool = self._check_pool(global_pool)
        self.num_classes = num_classes
        self.head = self._classifier(num_classes, device=parameter.device, dtype=parameter.dtype)
        self.head.apply(init_linear).train(self.training)

    def _unpooled(self, pre_logits: bool) -> bool:
        """Whether the head hands features on as they are: nothing is left of it."""
        return not (self.global_pool or self.num_classes > 0 or pre_logits)

    def _classify(self, x: Tensor, pre_logits: bool) -> Tensor:
        """Invariant features (..., width) to logits, or to what the classifier would see."""
        x = self.head_drop(self.norm(x))
        return x if pre_logits else self.head(x)
