"""What the families share, which is most of timm's model interface.

A network embeds an image, runs a number of steps (blocks, or stages of blocks), keeps what flopping
leaves alone, pools it and classifies it. A family says how in a few methods.

Maps leave a network packed, [s | a], and in the ordinary order, left to right
(`features_only=True`, `forward_intermediates`). Flopping the image flips them, leaves channels
[0, C/2) alone and negates channels [C/2, C); `feature_info[i]["symmetric_channels"]` says how many
are left alone.
"""

# no postponed annotations: symbolic tracers copy those of forward into the code they generate
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal, cast

import torch
from timm.layers import get_device_dtype, to_2tuple
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from deit.groups import FLOP
from deit.layers import tracing

Pool = Literal["", "token", "avg"]
Size = int | tuple[int, int]  # of a square, or (height, width)
Feature = Tensor | tuple[Tensor, ...]  # between layers: parts, or one tensor where it is ordinary


def pack(x: Feature) -> Tensor:
    """The parts of a feature side by side along the last axis; an ordinary feature as it is."""
    return torch.cat(x, -1) if isinstance(x, tuple) else x


def init_linear(module: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> None:
    """Truncated normal, 0.02, for the weight of a layer of these kinds; zero for its bias."""
    if isinstance(module, kinds):
        layer = cast(nn.Linear, module)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


LEAST = dict.fromkeys(
    ("in_chans", "img_size", "embed_dim", "depth", "num_heads", "patch_size", "depths", "dims"), 1
) | {"num_classes": 0}


def check_sizes(**sizes: Any) -> None:
    """Raise ValueError if one of a network's sizes is less than `LEAST` says, or no whole number.

    Other arguments, and None, are let pass.
    """
    for name, least in LEAST.items():
        size = sizes.get(name)
        numbers = () if size is None else to_2tuple(size)
        whole = all(isinstance(number, Integral) for number in numbers)
        if not (whole and min(numbers, default=least) >= least):
            raise ValueError(f"{name} must be at least {least} and a whole number, not {size!r}")


@torch.no_grad()
def scale_classifier(head: nn.Module, scale: float) -> None:
    """Multiply a classifier's initial weights; without a classifier do nothing."""
    if isinstance(head, nn.Linear):
        head.weight.mul_(scale)
        head.bias.mul_(scale)


def groups_by_depth(stem: str) -> dict[str, Any]:
    """For timm's `group_matcher`: a pattern for the first layers, then blocks, then the norm."""
    return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


class Scriptable:
    """A network that `torch.jit.script` compiles from its traced graph.

    TorchScript reads a layer's source, and knows neither groups nor representations. They are all
    decided when a network is made, so symbolic tracing leaves plain tensor operations.
    """

    def __prepare_scriptable__(self) -> GraphModule:
        """torch's hook: what to script in place of this network, in the mode that it is in."""
        return symbolic_trace(cast(nn.Module, self))


class Classifier(Scriptable, nn.Module):
    """A network of steps and a head.

    The constructor of a family calls this one, builds stem and steps, describes each step in
    `feature_info`, and calls `_build_head`.

    Args:
        in_chans: colours of the images.
        num_classes: 0 for no classifier.
        global_pool: one of the family's `pools`, "" for none.
        equivariant: whether features are so to the end.
        use_symmetrized_asym_feats: classify [s, |a|] in place of s.
        drop_rate: dropout before the classifier.
        head_init_scale: factor on the classifier's initial weights.

    Raises:
        ValueError: for sizes that do not divide and options that exclude each other.
    """

    blocks: nn.Sequential
    # an entry for each step; its `symmetric_channels` is None if nothing is promised
    feature_info: list[dict[str, Any]]
    num_features: int  # channels of `forward_features`
    head_hidden_size: int  # channels that are classified

    # what a family says

    pools: tuple[str, ...] = ("avg", "")
    norm_of_head: bool = True  # of pooled features
    stem_keys: str = r"^patch_embed"
    drawn: tuple[type[nn.Module], ...] = (nn.Linear,)  # layers that start as `init_linear` says

    def _embed(self, images: Tensor) -> Feature:
        """(B, in_chans, H, W) to the features that the steps work on."""
        raise NotImplementedError

    def _steps(self) -> list[list[nn.Module]]:
        """The modules to run in each step. Features can be taken after each step."""
        return [[block] for block in self.blocks]

    def _truncate(self, steps: int) -> None:
        """Drop all but the first steps."""
        self.blocks = self.blocks[:steps]

    def _to_map(self, x: Feature) -> Tensor:
        """Features to an ordinary image of packed channels, (B, C, H, W)."""
        raise NotImplementedError

    def _finish(self, x: Feature) -> Tensor:
        """Features after the last step to what `forward_features` gives."""
        raise NotImplementedError

    def pool(self, x: Tensor) -> Tensor:
        """Those to invariants (B, head_hidden_size), or without pooling with more axes between."""
        raise NotImplementedError

    # construction

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        *,
        equivariant: bool = True,
        use_symmetrized_asym_feats: bool = False,
        drop_rate: float = 0.0,
        head_init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_sizes(in_chans=in_chans, num_classes=num_classes)
        if use_symmetrized_asym_feats and not equivariant:
            raise ValueError(
                "use_symmetrized_asym_feats needs equivariant features at the head: an ordinary "
                "network, or one with a bridge, has no antisymmetric part there"
            )
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.equivariant = equivariant
        self.use_symmetrized_asym_feats = use_symmetrized_asym_feats
        self.head_drop = nn.Dropout(drop_rate)
        self.head_init_scale = head_init_scale
        self.grad_checkpointing = False

    def _set_channels(self, channels: int) -> None:
        """Classify features of so many channels: of equivariant ones those that are invariant."""
        half = self.equivariant and not self.use_symmetrized_asym_feats
        self.head_hidden_size = FLOP.regular(channels).invariant if half else channels
        self.num_features = self.head_hidden_size

    def _build_head(self, channels: int, norm: Callable[..., nn.Module], **dd: Any) -> None:
        """Build what comes after steps that give so many channels, and initialise the network."""
        self._check_pool(self.global_pool)
        self._set_channels(channels)
        self.norm = norm(self.head_hidden_size if self.norm_of_head else channels, **dd)
        self.head = self._classifier(self.num_classes, **dd)
        self.init_weights(needs_reset=False)

    def _classifier(self, num_classes: int, **dd: Any) -> nn.Module:
        if num_classes <= 0:
            return nn.Identity()
        return nn.Linear(self.head_hidden_size, num_classes, **dd)

    def _check_pool(self, pool: str) -> str:
        """`pool`, or a ValueError if the network cannot pool so."""
        if pool not in self.pools:
            known = ", ".join(repr(own) for own in self.pools[:-1])
            raise ValueError(
                f"global_pool {pool!r} is not equivariant or not known: use {known}, or '' for none"
            )
        return pool

    def init_weights(self, needs_reset: bool = True) -> None:
        """Truncated normal, 0.02, for the layers of `drawn`; the rest by its own rule.

        `needs_reset` is as in timm: False if the layers have just initialised themselves.
        """
        if needs_reset:
            with torch.no_grad():
                for module in self.modules():
                    if reset := getattr(module, "reset_parameters", None):
                        reset()
        self.apply(lambda module: init_linear(module, self.drawn))
        scale_classifier(self.head, self.head_init_scale)

    # timm's interface

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond those of one dimension: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        return groups_by_depth(self.stem_keys)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes for none. `global_pool` changes the pooling."""
        check_sizes(num_classes=num_classes)
        if global_pool is not None:
            self.global_pool = self._check_pool(global_pool)
        self.num_classes = num_classes
        self.head = self._classifier(num_classes, **get_device_dtype(self))
        self.head.apply(init_linear).train(self.training)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the steps behind the last one wanted; returns the kept indices.

        A norm of pooled features belongs to the head. Both go too if they were made for a step of
        other channels.
        """
        take, last = feature_take_indices(len(self._steps()), indices)
        self._truncate(last + 1)
        width = self.head_hidden_size
        self._set_channels(self.feature_info[last]["num_chs"])
        prune_head = prune_head or self.head_hidden_size != width
        if prune_norm or (prune_head and self.norm_of_head):
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    # forward

    def _run(
        self, images: Tensor, take: Sequence[int] = (), stop: int | None = None
    ) -> tuple[Feature, list[Feature]]:
        """Steps before number `stop`; also what those in `take` give."""
        tracing.check_images(images, self.in_chans)
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

    def _run_and_take(
        self, images: Tensor, indices: int | list[int] | None, stop_early: bool, output_fmt: str
    ) -> tuple[Feature, list[Feature]]:
        """`_run` by the arguments of `forward_intermediates`."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is not known: use 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self._steps()), indices)
        return self._run(images, take, last + 1 if stop_early else None)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to features before pooling, with `num_features` channels."""
        x, _ = self._run(x)
        return self._finish(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (B, num_classes), or to the invariant ones that the classifier sees.

        Without pooling each place is classified, (B, ..., num_classes).
        """
        x = self.head_drop(self.pool(x))
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
        x, taken = self._run_and_take(x, indices, stop_early, output_fmt)
        maps = [self._to_map(y) for y in taken]
        if output_fmt == "NLC":
            maps = [y.flatten(2).mT for y in maps]
        return maps if intermediates_only else (self._finish(x), maps)
