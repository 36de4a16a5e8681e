"""The ordinary twins of the transformers and perceptrons: timm's networks under published keys.

The twins of the isotropic ConvNeXts are built by `IsotropicConvNeXt`; those of the hierarchical
ones are timm's `convnext_*`.

Source: DeiT III, arXiv:2204.07118; parallel branches, arXiv:2203.09795; ResMLP, arXiv:2105.03404.
"""

# no postponed annotations: symbolic tracers copy those of forward into the code they generate
import re
from functools import partial
from typing import Any, cast

import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as timm_filter_fn
from torch import Tensor, nn

from deit.layers import (
    OrdinaryAffine,
    OrdinaryBlock,
    OrdinaryLayerNorm,
    OrdinaryMixerBlock,
    tracing,
)
from deit.layers.ordinary import ParallelBlock
from deit.models.base import (
    Pool,
    Scriptable,
    check_sizes,
    groups_by_depth,
    init_linear,
    scale_classifier,
)
from deit.models.registry import register_sizes
from deit.models.resmlp import SIZES as RESMLP_SIZES
from deit.models.vit import SIZES as VIT_SIZES


class _Ordinary(Scriptable):
    """A network of timm's that can be scripted, and refuses what is no image."""

    patch_embed: Any

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Images to normalised tokens, (B, in_chans, H, W) -> (B, prefix + N, C)."""
        tracing.check_images(x, self.patch_embed.proj.in_channels)
        # not in a cast: compilers of Python 3.12 and later see through `super().name` alone
        return super().forward_features(x, *args, **kwargs)  # type: ignore[misc]


class OrdinaryVisionTransformer(_Ordinary, TimmVisionTransformer):
    """timm's VisionTransformer as DeiT III uses it, with the published keys.

    Args:
        init_scale: initial LayerScale; None for none.
        parallel: two branches in parallel for each half of a block, see `ParallelBlock`.
        drop_path_rate: the same for all blocks, as published (timm's rises with depth).
        use_fused_attn: None leaves the choice to timm.
        head_init_scale: factor on the classifier's initial weights.
        kwargs: timm's.
    """

    def __init__(
        self,
        *,
        init_scale: float | None = 1e-4,
        parallel: bool = False,
        drop_path_rate: float = 0.0,
        use_fused_attn: bool | None = None,
        head_init_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        def block(**options: Any) -> OrdinaryBlock:
            options.update(
                init_values=init_scale, drop_path=drop_path_rate, use_fused_attn=use_fused_attn
            )
            return (ParallelBlock if parallel else OrdinaryBlock)(**options)

        check_sizes(**kwargs)
        super().__init__(
            block_fn=cast("type[nn.Module]", block),
            norm_layer=OrdinaryLayerNorm,
            no_embed_class=True,
            **kwargs,
        )
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        scale_classifier(self.head, head_init_scale)


class OrdinaryResMLP(_Ordinary, MlpMixer):
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
        check_sizes(depth=depth, **kwargs)
        super().__init__(
            num_blocks=depth,
            mlp_ratio=mlp_ratio,
            block_layer=cast(Any, partial(OrdinaryMixerBlock, init_values=init_scale)),
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
        return groups_by_depth(r"^patch_embed")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond those of one dimension: none."""
        return set()

    def reset_classifier(self, num_classes: int, global_pool: Pool | None = None) -> None:
        """Replace the classifier; 0 classes for none. `global_pool` changes the pooling."""
        super().reset_classifier(num_classes, global_pool)
        self.head.apply(init_linear)


VIT_KEYS = {r"\.ls([12])\.gamma$": r".gamma_\1"}
RESMLP_KEYS = {
    r"^stem\.": "patch_embed.",
    r"\.ls([12])$": r".gamma_\1",
    r"\.linear_tokens\.": ".attn.",
    r"\.mlp_channels\.": ".mlp.",
}


def vit_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Published or timm's keys to ours; positions and patches of other sizes are resampled."""
    return timm_filter_fn(_renamed(state_dict, VIT_KEYS), model)


def resmlp_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Published or timm's keys and shapes to ours.

    Raises:
        ValueError: for weights of another patch size.
    """
    state_dict = _renamed(state_dict, RESMLP_KEYS)
    kernel, own = state_dict.get("patch_embed.proj.weight"), model.patch_embed.proj.weight
    if kernel is not None and kernel.shape[2:] != own.shape[2:]:
        raise ValueError(
            f"these weights are of patches of {kernel.shape[-1]} pixels, and the network has "
            f"patches of {own.shape[-1]}: create it with patch_size={kernel.shape[-1]}"
        )
    return {
        key: value.flatten() if key.endswith((".alpha", ".beta")) else value
        for key, value in state_dict.items()
    }


def _renamed(state_dict: dict[str, Any], rules: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state_dict.get("model", state_dict).items():
        for pattern, replacement in rules.items():
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


SMALL, BASE = VIT_SIZES["small_patch16_LS"], VIT_SIZES["base_patch16_LS"]
# of these there is no equivariant network; parallel branches are counted by the second number
FURTHER: dict[str, dict[str, Any]] = {
    "small_patch16_36": {**SMALL, "depth": 36},
    "small_patch16_18x2": {**SMALL, "depth": 18, "parallel": True},
    "base_patch16_36x1": {**BASE, "depth": 36},
    "base_patch16_18x2": {**BASE, "depth": 18, "parallel": True},
}
WITHOUT_LAYER_SCALE = {name: {**row, "init_scale": None} for name, row in FURTHER.items()}
FURTHER["huge_patch14_26x2"] = {**VIT_SIZES["huge_patch14_LS"], "depth": 26, "parallel": True}
VITS = VIT_SIZES | {f"{name}_LS": row for name, row in FURTHER.items()} | WITHOUT_LAYER_SCALE

register_sizes(
    __name__,
    OrdinaryVisionTransformer,
    {f"deit_{name}": row for name, row in VITS.items()},
    cfg={"first_conv": "patch_embed.proj", "fixed_input_size": True},
    filter_fn=vit_filter_fn,
)
register_sizes(
    __name__,
    OrdinaryResMLP,
    {
        "resmlp_12": RESMLP_SIZES["12"],
        "resmlp_24": RESMLP_SIZES["24"],
        "resmlp_36": dict(embed_dim=384, depth=36, init_scale=1e-6),
        "resmlpB_24": RESMLP_SIZES["B_24"],
        "resmlpL_24": RESMLP_SIZES["L_24"],
    },
    cfg={"first_conv": "patch_embed.proj", "fixed_input_size": True},
    filter_fn=resmlp_filter_fn,
)
