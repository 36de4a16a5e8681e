"""Perceptrons over tokens and channels (ResMLP): equivariant, and their ordinary twins.

Mixing tokens is a linear map too, so the token axis is decomposed as the channels are. Inside the
network features are parts s and a of (B, N, C/2), each with its symmetric tokens first, then its
antisymmetric ones. Entries are named by channel irrep and token irrep; flopping negates sa and as:

                            s  |  a
    tokens symmetric       ss  |  as
    tokens antisymmetric   sa  |  aa

Maps leave the network (`forward_intermediates`, `features_only=True`) in the ordinary order, left
to right, with C packed channels. Flopping the image flips them, leaves channels [0, C/2) alone and
negates channels [C/2, C); `feature_info[i]["symmetric_channels"]` says how many are left alone.
`forward_features` gives the invariant features that are classified: ss and aa, and with
`use_symmetrized_asym_feats` |sa| and |as|.

Source: arXiv:2502.05169, section 4; ResMLP, arXiv:2105.03404.
"""

# no postponed annotations: symbolic tracers copy those of forward into the code they generate
from functools import partial
from typing import Any, cast

import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from deit.groups import FLOP
from deit.layers import (
    MirrorHalves,
    MixerBlock,
    OrdinaryAffine,
    OrdinaryMixerBlock,
    PatchEmbed,
    tracing,
)
from deit.models.base import (
    SIZE_ARGUMENTS,
    Feature,
    Pool,
    PooledClassifier,
    check_sizes,
    init_linear,
    pack,
    scale_classifier,
)
from deit.models.hub import resmlp_filter_fn
from deit.models.registry import register_sizes
from deit.models.scripting import Scriptable

__all__ = ["OrdinaryResMLP", "ResMLP"]


class ResMLP(PooledClassifier):
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
        check_sizes(in_chans=in_chans, embed_dim=embed_dim, depth=depth)
        check_sizes(patch_size=patch_size, num_classes=num_classes)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.use_symmetrized_asym_feats = use_symmetrized_asym_feats

        # no factor root one half here, unlike the other families
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, scale=1.0, **dd)
        grid = self.patch_embed.grid
        self.patch_embed.flatten_and_permute_to_fourier = MirrorHalves(grid, device)
        channels, self.tokens = FLOP.regular(embed_dim), grid.rep
        self.blocks = nn.Sequential(
            *(
                MixerBlock(
                    channels,
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
        self.feature_info = [
            {
                "module": f"blocks.{i}",
                "num_chs": embed_dim,
                "reduction": self.patch_embed.feat_ratio(),
                "symmetric_channels": channels.invariant,
            }
            for i in range(depth)
        ]
        self._init_head(OrdinaryAffine, num_classes, global_pool, drop_rate, head_init_scale, **dd)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates."""
        return {
            "stem": r"^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def _embed(self, images: Tensor) -> Feature:
        """Images to parts with decomposed tokens, (B, N, C/2)."""
        tracing.check_images(images, self.in_chans)
        return tuple(self.tokens.from_regular(part, 1) for part in self.patch_embed(images))

    def _steps(self) -> list[list[nn.Module]]:
        return [[block] for block in self.blocks]

    def _truncate(self, steps: int) -> None:
        self.blocks = self.blocks[:steps]

    def _to_map(self, x: Feature) -> Tensor:
        image = self.patch_embed.grid.to_image_order(self.tokens.to_regular(pack(x), 1))
        return image.permute(0, 3, 1, 2).contiguous()

    def _set_channels(self, channels: int) -> None:
        own = FLOP.regular(channels).invariant
        self.num_features = channels if self.use_symmetrized_asym_feats else own
        self.head_hidden_size = self.num_features

    def _finish(self, x: Feature) -> Tensor:
        """Parts with decomposed tokens to (B, N, num_features).

        The N rows are invariant entries of the token axis, and no places.
        """
        (ss, sa), (as_, aa) = (self.tokens.split(part, 1) for part in x)
        y = torch.cat([ss, aa], 1)
        if not self.use_symmetrized_asym_feats:
            return y
        return torch.cat([y, torch.cat([as_, sa], 1).abs()], -1)

    def _pool(self, x: Tensor) -> Tensor:
        # before the norm, which is affine here and commutes with a mean
        return x.mean(1) if self.global_pool == "avg" else x


class OrdinaryResMLP(Scriptable, MlpMixer):
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
        check_sizes(depth=depth, **{k: kwargs[k] for k in SIZE_ARGUMENTS if k in kwargs})
        super().__init__(
            num_blocks=depth,
            mlp_ratio=mlp_ratio,
            block_layer=cast(Any, partial(OrdinaryMixerBlock, init_values=init_scale)),
            norm_layer=OrdinaryAffine,
            **kwargs,
        )
        # timm's constructor has just registered it under its own name
        self.patch_embed: Any = self._modules.pop("stem")
        scale_classifier(self.head, head_init_scale)

    @property
    def stem(self) -> nn.Module:
        """timm's name of `patch_embed`."""
        return self.patch_embed

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to normalised tokens, (B, in_chans, H, W) -> (B, N, C)."""
        tracing.check_images(x, self.patch_embed.proj.in_channels)
        return super().forward_features(x)

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
    filter_fn=resmlp_filter_fn,
)
