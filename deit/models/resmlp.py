"""Perceptrons over tokens and channels (ResMLP): equivariant, and their ordinary twins.

Mixing tokens is a linear map too, so the token axis is decomposed as the channels are. Inside the
network features are packed in both axes, (B, N, C): tokens symmetric, then antisymmetric; channels
likewise. A part is named by its channel irrep and its token irrep, and flopping negates sa and as:

                      channels s | channels a
    tokens symmetric      ss     |     as
    tokens antisymmetric  sa     |     aa

Whatever leaves the network as a map or as tokens is in the ordinary order, row-major and left to
right, with packed channels. There flopping the image flips the map, leaves channels [0, C/2) alone
and negates channels [C/2, C); `feature_info[i]["symmetric_channels"]` says how many are left alone.

Source: arXiv:2502.05169, section 4; ResMLP, arXiv:2105.03404.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from deit.groups import FLOP
from deit.layers import MirrorHalves, MixerBlock, OrdinaryAffine, OrdinaryMixerBlock, PatchEmbed
from deit.models.base import HeadMixin, Pool, init_linear, scale_classifier
from deit.models.registry import register_sizes

__all__ = ["OrdinaryResMLP", "ResMLP"]


class ResMLP(HeadMixin, nn.Module):
    """A ResMLP that is equivariant under flopping.

    Args:
        img_size, patch_size: one number or (height, width). The maps over tokens are as large as
            the grid, so a network takes images of this size alone.
        num_classes: 0 for no classifier.
        global_pool: average over tokens, or none.
        init_scale: initial LayerScale.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in the channel perceptrons.
        drop_path_rate: stochastic depth, the same for all blocks.
        use_symmetrized_asym_feats: classify [ss, aa] and [|sa|, |as|] in place of [ss, aa].
        head_init_scale: factor on the classifier's initial weights.

    Raises:
        ValueError: for sizes that do not divide.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pool = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        *,
        init_scale: float = 1e-4,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        use_symmetrized_asym_feats: bool = False,
        head_init_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_features = self.embed_dim = embed_dim
        self.use_symmetrized_asym_feats = use_symmetrized_asym_feats
        self.channels = FLOP.regular(embed_dim)

        # no factor root one half here, unlike the other families
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, scale=1.0, **dd)
        self.grid = self.patch_embed.grid
        self.tokens = self.grid.rep
        self.patch_embed.flatten_and_permute_to_fourier = MirrorHalves(self.grid, device)
        self.blocks = nn.Sequential(
            *(
                MixerBlock(
                    self.channels,
                    self.tokens,
                    mlp_ratio,
                    init_values=init_scale,
                    drop=proj_drop_rate,
                    drop_path=drop_path_rate,
                    **dd,
                )
                for _ in range(depth)
            )
        )
        width = embed_dim if use_symmetrized_asym_feats else self.channels.invariant
        self.norm = OrdinaryAffine(width, **dd)
        self._init_head(width, num_classes, global_pool, drop_rate, head_init_scale, **dd)
        self.feature_info = [
            {
                "module": f"blocks.{i}",
                "num_chs": embed_dim,
                "reduction": self.patch_embed.feat_ratio(),
                "symmetric_channels": self.channels.invariant,
            }
            for i in range(depth)
        ]
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal, 0.02, for linear weights; zero biases; the rest by its own rule."""
        self.apply(init_linear)
        scale_classifier(self.head, self.head_init_scale)

    # timm's interface

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        return {
            "stem": r"^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Present for timm's interface: the sizes of a ResMLP are fixed.

        Raises:
            ValueError: if a size differs from the constructed one.
        """
        for what, size, own in (
            ("image", img_size, self.patch_embed.img_size),
            ("patch", patch_size, self.patch_embed.patch_size),
        ):
            if size is not None and to_2tuple(size) != own:
                raise ValueError(
                    f"the {what} size is fixed at {own[0]} x {own[1]}, not {size}: the maps over "
                    f"tokens have the size of the {self.grid.height} x {self.grid.width} grid; "
                    "create a network of the other size"
                )

    # forward

    def _embed(self, images: Tensor) -> Tensor:
        """Images to patches that are packed in both axes, (B, N, C)."""
        return self.tokens.from_regular(self.patch_embed(images), 1)

    def _run(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def _to_image(self, x: Tensor) -> Tensor:
        """(B, N, C) packed in both axes to an image of packed channels, (B, H, W, C)."""
        return self.grid.to_image_order(self.tokens.to_regular(x, 1))

    def _from_image(self, x: Tensor) -> Tensor:
        """The inverse of `_to_image`."""
        return self.tokens.from_regular(self.grid.to_mirror_order(x), 1)

    def _invariants(self, x: Tensor) -> Tensor:
        """(B, N, C) packed in both axes to (B, N, width) of what flopping leaves alone."""
        symmetric, antisymmetric = self.tokens.split(x, 1)
        ss, as_ = self.channels.split(symmetric)
        sa, aa = self.channels.split(antisymmetric)
        x = torch.cat([ss, aa], 1)
        if not self.use_symmetrized_asym_feats:
            return x
        return torch.cat([x, torch.cat([as_, sa], 1).abs()], -1)

    def _head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self._unpooled(pre_logits):
            return self._to_image(x).flatten(1, 2)
        x = self._invariants(x)
        if self.global_pool == "avg":  # before the affine norm, which commutes with a mean
            x = x.mean(1)
        return self._classify(x, pre_logits)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to tokens (B, N, C), row-major, with packed channels, before the final norm."""
        return self._to_image(self._run(self._embed(x))).flatten(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` to logits (B, num_classes), or to what is classified.

        Without pooling there is a row for each invariant token component, not for each place;
        without pooling and classifier the tokens are returned as they came.
        """
        image = x.unflatten(1, (self.grid.height, self.grid.width))
        return self._head(self._from_image(image), pre_logits)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, num_classes)
        return self._head(self._run(self._embed(x)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after chosen blocks, as timm's MlpMixer returns them.

        Maps are (B, C, H, W) or tokens (B, N, C), left to right. `norm` changes nothing: the final
        norm belongs to the invariant features, of which there are no maps.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is not known: use 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        x = self._embed(x)
        intermediates = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint_seq([block], x) if self.grad_checkpointing else block(x)
            if i in take:
                image = self._to_image(x)
                intermediates.append(
                    image.permute(0, 3, 1, 2).contiguous()
                    if output_fmt == "NCHW"
                    else image.flatten(1, 2)
                )
        if intermediates_only:
            return intermediates
        return self._to_image(x).flatten(1, 2), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the blocks behind the last one wanted; returns the kept indices."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take


class OrdinaryResMLP(MlpMixer):
    """timm's MlpMixer as ResMLP uses it, with the published keys and initialisation.

    Args:
        init_scale: initial LayerScale.
        depth: number of blocks.
        head_init_scale: factor on the classifier's initial weights.
        kwargs: timm's.
    """

    def __init__(
        self,
        *,
        init_scale: float = 1e-4,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        head_init_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_blocks=depth,
            mlp_ratio=mlp_ratio,
            block_layer=partial(OrdinaryMixerBlock, init_values=init_scale),
            norm_layer=OrdinaryAffine,
            **kwargs,
        )
        # timm's constructor has just registered it under its own name
        self.patch_embed = self._modules.pop("stem")
        scale_classifier(self.head, head_init_scale)

    @property
    def stem(self) -> nn.Module:
        """timm's name of `patch_embed`."""
        return self.patch_embed

    def init_weights(self, nlhb: bool = False) -> None:
        """As in `ResMLP`, not timm's; `nlhb` (a bias of -log classes) is refused."""
        if nlhb:
            raise ValueError("nlhb=True is timm's initialisation; the published one has no bias")
        self.apply(init_linear)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        return ResMLP.group_matcher(self, coarse)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond those of one dimension: none."""
        return set()

    def reset_classifier(self, num_classes: int, global_pool: Pool | None = None) -> None:
        """Replace the classifier; 0 classes for none. `global_pool` changes the pooling."""
        super().reset_classifier(num_classes, global_pool)
        self.head.apply(init_linear)


# name: embed_dim, depth, init_scale
SIZES = {
    "12": (384, 12, 0.1),
    "24": (384, 24, 1e-5),
    "B_24": (768, 24, 1e-6),
    "L_24": (1280, 24, 1e-6),
}
ORDINARY_SIZES = {
    "resmlp_12": SIZES["12"],
    "resmlp_24": SIZES["24"],
    "resmlp_36": (384, 36, 1e-6),
    "resmlpB_24": SIZES["B_24"],
    "resmlpL_24": SIZES["L_24"],
}


def _row(size: tuple[int, int, float]) -> dict[str, Any]:
    return dict(zip(("embed_dim", "depth", "init_scale"), size, strict=True))


register_sizes(
    __name__,
    ResMLP,
    {f"resmlp_equi_d2_{name}": _row(size) for name, size in SIZES.items()},
    cfg={
        "first_conv": ("patch_embed.proj_sym", "patch_embed.proj_asym"),
        "fixed_input_size": True,
    },
)
register_sizes(
    __name__,
    OrdinaryResMLP,
    {name: _row(size) for name, size in ORDINARY_SIZES.items()},
    cfg={"first_conv": "patch_embed.proj", "fixed_input_size": True},
)
