"""The ordinary twin of the equivariant vision transformers (DeiT III, arXiv:2204.07118)."""

from __future__ import annotations

from typing import Any, cast

from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from deit.layers import OrdinaryBlock, OrdinaryLayerNorm, tracing
from deit.models.base import SIZE_ARGUMENTS, check_sizes, scale_classifier
from deit.models.scripting import Scriptable

__all__ = ["OrdinaryVisionTransformer", "ParallelBlock"]


class ParallelBlock(OrdinaryBlock):
    """Two attentions side by side, then two perceptrons: half the depth at the same size.

    x + attn(x) + attn1(x), then y + mlp(y) + mlp1(y), each branch with its own norm and LayerScale.

    Source: arXiv:2203.09795; the keys are the published ones (norm11, attn1, gamma_1_1, norm21,
    mlp1, gamma_2_1).
    """

    gamma_1_1: nn.Parameter
    gamma_2_1: nn.Parameter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        second = OrdinaryBlock(*args, **kwargs)
        self.norm11, self.attn1, self.gamma_1_1 = second.norm1, second.attn, second.gamma_1
        self.norm21, self.mlp1, self.gamma_2_1 = second.norm2, second.mlp, second.gamma_2

    def reset_parameters(self) -> None:
        """LayerScale's initial value; the submodules reset themselves."""
        super().reset_parameters()
        if self.init_values is not None:
            nn.init.constant_(self.gamma_1_1, self.init_values)
            nn.init.constant_(self.gamma_2_1, self.init_values)

    def forward(self, x: Tensor, **attn_options: Any) -> Tensor:  # (B, N, C)
        first = self._scale(self.gamma_1, self.attn(self.norm1(x), **attn_options))
        second = self._scale(self.gamma_1_1, self.attn1(self.norm11(x), **attn_options))
        x = x + self.drop_path1(first) + self.drop_path1(second)
        first = self._scale(self.gamma_2, self.mlp(self.norm2(x)))
        second = self._scale(self.gamma_2_1, self.mlp1(self.norm21(x)))
        return x + self.drop_path2(first) + self.drop_path2(second)


class OrdinaryVisionTransformer(Scriptable, TimmVisionTransformer):
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

        check_sizes(**{name: kwargs[name] for name in SIZE_ARGUMENTS if name in kwargs})
        super().__init__(
            block_fn=cast("type[nn.Module]", block),
            norm_layer=OrdinaryLayerNorm,
            no_embed_class=True,
            **kwargs,
        )
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        scale_classifier(self.head, head_init_scale)

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Images to normalised tokens, (B, in_chans, H, W) -> (B, prefix + N, C)."""
        tracing.check_images(x, self.patch_embed.proj.in_channels)
        return super().forward_features(x, *args, **kwargs)
