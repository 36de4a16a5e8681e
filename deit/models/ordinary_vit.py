"""The ordinary twin of the equivariant vision transformers (DeiT III, arXiv:2204.07118)."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn

from deit.layers import OrdinaryBlock, OrdinaryLayerNorm
from deit.models.base import scale_classifier
from deit.models.scripting import Scriptable

__all__ = ["OrdinaryVisionTransformer"]


class OrdinaryVisionTransformer(Scriptable, TimmVisionTransformer):
    """timm's VisionTransformer as DeiT III uses it, with the published keys.

    Args:
        init_scale: initial LayerScale.
        drop_path_rate: the same for all blocks, as published (timm's rises with depth).
        use_fused_attn: None leaves the choice to timm.
        head_init_scale: factor on the classifier's initial weights.
        kwargs: timm's.
    """

    def __init__(
        self,
        *,
        init_scale: float = 1e-4,
        drop_path_rate: float = 0.0,
        use_fused_attn: bool | None = None,
        head_init_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        def block(**options: Any) -> OrdinaryBlock:
            options.update(
                init_values=init_scale, drop_path=drop_path_rate, use_fused_attn=use_fused_attn
            )
            return OrdinaryBlock(**options)

        super().__init__(
            block_fn=block, norm_layer=OrdinaryLayerNorm, no_embed_class=True, **kwargs
        )
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        scale_classifier(self.head, head_init_scale)
