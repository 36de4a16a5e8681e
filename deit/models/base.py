"""Networks that classify pooled invariant features: what the families of perceptrons and of
convolutions share, which is most of timm's model interface.

They run a stem and a number of steps (blocks, or stages of blocks), keep what flopping leaves
alone, pool it, normalise it and classify it. A transformer's class token is normalised before, and
needs none of this.
"""

# no postponed annotations: symbolic tracers copy those of forward into the code they generate
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import to_2tuple
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from deit.models.scripting import Scriptable

__all__ = [
    "SIZE_ARGUMENTS",
    "ClassifierMethods",
    "Feature",
    "Pool",
    "PooledClassifier",
    "check_sizes",
    "init_linear",
    "pack",
    "reset_layers",
    "scale_classifier",
]

Pool = Literal["", "avg"]
Feature = Tensor | tuple[Tensor, ...]  # between layers: parts, or one tensor where it is ordinary


def pack(x: Feature) -> Tensor:
    """The parts of a feature side by side along the last axis; an ordinary feature as it is."""
    return torch.cat(x, -1) if isinstance(x, tuple) else x


def init_linear(module: nn.Module) -> None:
    """Truncated normal, 0.02, for the weight of a linear layer; zero for its bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# arguments of ordinary networks that timm takes without a look
SIZE_ARGUMENTS = ("in_chans", "embed_dim", "depth", "num_heads", "patch_size", "num_classes")


def check_sizes(**sizes: int | tuple[int, int]) -> None:
    """Raise ValueError unless all sizes of a network are positive; `num_classes` may be 0."""
    for name, size in sizes.items():
        least = 0 if name == "num_classes" else 1
        if min(to_2tuple(size)) < least:
            raise ValueError(f"{name} must be at least {least}, not {size}")


@torch.no_grad()
def reset_layers(model: nn.Module) -> None:
    """Let every layer write its initial parameters and buffers again, as in its constructor."""
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


@torch.no_grad()
def scale_classifier(head: nn.Module, scale: float) -> None:
    """Multiply a classifier's initial weights; without a classifier do nothing."""
    if isinstance(head, nn.Linear):
        head.weight.mul_(scale)
        head.bias.mul_(scale)


class ClassifierMethods(nn.Module):
    """timm's methods about the classifier `head`, for networks with `head_hidden_size`."""

    head: nn.Module
    head_hidden_size: int

    def _check_pool(self, pool: str) -> str:
        """`pool`, or a ValueError if the network cannot pool so."""
        raise NotImplementedError

    def _classifier(self, num_classes: int, **dd: Any) -> nn.Module:
        if num_classes <= 0:
            return nn.Identity()
        return nn.Linear(self.head_hidden_size, num_classes, **dd)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes for none. `global_pool` changes the pooling."""
        parameter = next(self.parameters())
        if global_pool is not None:
            self.global_pool = self._check_pool(global_pool)
        self.num_classes = num_classes
        self.head = self._classifier(num_classes, device=parameter.device, dtype=parameter.dtype)
        self.head.apply(init_linear).train(self.training)


class PooledClassifier(ClassifierMethods, Scriptable):
    """The common part of the families; a subclass builds the layers and says how to run them.

    Its constructor calls `_init_head` when stem, blocks and `feature_info` (an entry for each step)
    exist.
    """

    norm: nn.Module
    num_features: int  # channels of `forward_features`
    head_hidden_size: int  # channels that are classified
    feature_info: list[dict[str, Any]]

    # what a family says

    def _embed(self, images: Tensor) -> Feature:
        """(B, in_chans, H, W) to the features that the steps work on."""
        raise NotImplementedError

    def _steps(self) -> list[list[nn.Module]]:
        """The modules to run in each step. Features can be taken after each step."""
        raise NotImplementedError

    def _truncate(self, steps: int) -> None:
        """Drop all but the first steps."""
        raise NotImplementedError

    def _to_map(self, x: Feature) -> Tensor:
        """Features to an ordinary image of packed channels, (B, C, H, W)."""
        raise NotImplementedError

    def _set_channels(self, channels: int) -> None:
        """Classify features of so many channels: sets `num_features`, `head_hidden_size`."""
        raise NotImplementedError

    def _finish(self, x: Feature) -> Tensor:
        """Features after the last step to what `forward_features` gives."""
        raise NotImplementedError

    def _pool(self, x: Tensor) -> Tensor:
        """Those to invariants (B, head_hidden_size), or without pooling with more axes between."""
        raise NotImplementedError

    # construction

    def _init_head(
        self,
        norm_layer: Any,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        head_init_scale: float,
        **dd: Any,
    ) -> None:
        self._set_channels(self.feature_info[-1]["num_chs"])
        self.num_classes = num_classes
        self.global_pool = self._check_pool(global_pool)
        self.head_init_scale = head_init_scale
        self.grad_checkpointing = False
        self.norm = norm_layer(self.head_hidden_size, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._classifier(num_classes, **dd)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise by the family's rule; `head_init_scale` is a factor on the classifier.

        `needs_reset` is as in timm: False if the layers have just initialised themselves.
        """
        if needs_reset:
            reset_layers(self)
        self.apply(self._init_module)
        scale_classifier(self.head, self.head_init_scale)

    _init_module = staticmethod(init_linear)

    def _check_pool(self, pool: str) -> str:
        if pool not in ("", "avg"):
            raise ValueError(f"global_pool {pool!r} is not known: use 'avg', or '' for none")
        return pool

    # timm's interface

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond those of one dimension: none."""
        return set()

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the steps behind the last one wanted; returns the kept indices.

        The norm belongs to the head, and both go too if they were made for a dropped step.
        """
        take, last = feature_take_indices(len(self._steps()), indices)
        self._truncate(last + 1)
        width = self.head_hidden_size
        self._set_channels(self.feature_info[last]["num_chs"])
        prune_head = prune_head or self.head_hidden_size != width
        if prune_norm or prune_head:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    # forward

    def _run(
        self, images: Tensor, take: Sequence[int] = (), stop: int | None = None
    ) -> tuple[Feature, list[Feature]]:
        """Steps before number `stop`; also what those in `take` give."""
        x = self._embed(images)
        taken = []
        for i, step in enumerate(self._steps()):
            if i == stop:
                break
            for module in step:
                x = checkpoint(module, x) if self.grad_checkpointing else module(x)
            if i in take:
                taken.append(x)
        return x, taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to features before pooling, with `num_features` channels."""
        x, _ = self._run(x)
        return self._finish(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (B, num_classes), or to the invariant ones that the classifier sees.

        Without pooling each place is classified, (B, ..., num_classes).
        """
        x = self.head_drop(self.norm(self._pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, num_classes)
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after chosen steps with all their packed channels, by timm's interface.

        Maps are (B, C, H, W) or tokens (B, N, C), left to right. `norm` changes nothing: the norm
        belongs to the pooled features. The final features are those of `forward_features`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is not known: use 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self._steps()), indices)
        x, taken = self._run(x, take, last + 1 if stop_early else None)
        maps = [self._to_map(y) for y in taken]
        if output_fmt == "NLC":
            maps = [y.flatten(2).mT for y in maps]
        return maps if intermediates_only else (self._finish(x), maps)
