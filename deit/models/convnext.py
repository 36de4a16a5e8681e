"""ConvNeXt: equivariant, isotropic (one resolution) and hierarchical (four stages).

Inside, features are parts with channels last, s and a of (B, H, W, C/2). `forward_features` gives a
map too, packed. The head classifies means of s, and with `use_symmetrized_asym_feats` of |a| too.

The networks are fully convolutional. Flopping maps the kernels' positions to one another, and the
network is exactly equivariant, if the width of an image is a multiple of the total stride; another
width is an error. The height is free.

timm has the ordinary hierarchical networks under the names `convnext_*`; the ordinary isotropic
ones are here.

Source: arXiv:2502.05169, section 4; ConvNeXt, arXiv:2201.03545.
"""

# no postponed annotations: symbolic tracers copy those of forward into the code they generate
from collections.abc import Sequence
from itertools import islice, pairwise
from math import sqrt
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from deit.groups import FLOP, Rep
from deit.layers import (
    ConvBlock,
    InvariantBridge,
    LayerNorm,
    MirrorConv2d,
    MirrorKernel,
    OrdinaryConvBlock,
    OrdinaryLayerNorm,
    tracing,
)
from deit.models.base import Classifier, Feature, Pool, Size, check_sizes, pack
from deit.models.published import adapt_state
from deit.models.registry import register_sizes


class _ConvNeXt(Classifier):
    """What both have in common: channels are last, and means are normalised and classified.

    The arguments are those of `ConvNeXt`.
    """

    drawn = (nn.Linear, nn.Conv2d, MirrorKernel)

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        patch_size: Size,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pool = "avg",
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        *,
        init_scale: float,
        img_size: Size | None = None,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **head: Any,
    ) -> None:
        super().__init__(in_chans, num_classes, global_pool, **head)
        check_sizes(img_size=img_size, patch_size=patch_size)
        patch_size = to_2tuple(patch_size)
        if img_size is not None and self.equivariant:
            height, width = to_2tuple(img_size)
            tracing.check_total_stride(height, width, patch_size[1] * 2 ** (len(dims) - 1))
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        stem: nn.Module
        if self.equivariant:
            # the factor gives kernels built from halves the scale of ordinary ones
            colours = Rep(FLOP, free=0, fixed=in_chans)
            stem = MirrorConv2d(colours, dims[0], patch_size, patch_size, scale=sqrt(0.5), **dd)
        else:
            stem = nn.Conv2d(in_chans, dims[0], patch_size, patch_size, **dd)
        block = ConvBlock if self.equivariant else OrdinaryConvBlock
        count = sum(depths)
        rates = (drop_path_rate * i / max(count - 1, 1) for i in range(count))
        stages = [
            nn.Sequential(
                *(
                    block(dim, kernel_size, mlp_ratio, init_value=init_scale, drop_path=rate, **dd)
                    for rate in islice(rates, depth)
                )
            )
            for depth, dim in zip(depths, dims, strict=True)
        ]
        self.invariants = InvariantBridge(dims[-1]) if self.use_symmetrized_asym_feats else None
        self._keep(stem, stages, dims, patch_size[1], **dd)
        self._build_head(dims[-1], OrdinaryLayerNorm, **dd)

    def _keep(
        self,
        stem: nn.Module,
        stages: list[nn.Sequential],
        dims: Sequence[int],
        stride: int,
        **dd: Any,
    ) -> None:
        """Register stem and stages under the published names, and describe the steps."""
        raise NotImplementedError

    def _set_channels(self, channels: int) -> None:
        super()._set_channels(channels)
        self.num_features = channels

    def _embed(self, images: Tensor) -> Feature:
        if self.equivariant:
            stride = self.feature_info[len(self._steps()) - 1]["reduction"]
            tracing.check_total_stride(images.shape[-2], images.shape[-1], stride)
        return self._stem(images)

    def _stem(self, images: Tensor) -> Feature:
        """(B, in_chans, H, W) to (B, H', W', C), or its parts."""
        raise NotImplementedError

    def _to_map(self, x: Feature) -> Tensor:
        return pack(x).permute(0, 3, 1, 2)

    def _finish(self, x: Feature) -> Tensor:
        return self._to_map(x)

    def pool(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to normalised invariants (B, C'), or without pooling (B, H, W, C')."""
        x = x.permute(0, 2, 3, 1)
        if self.invariants is not None:
            x = self.invariants(tuple(FLOP.regular(self.num_features).split(x)))
        x = x[..., : self.head_hidden_size]
        return self.norm(x.mean((1, 2)) if self.global_pool == "avg" else x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps (B, C, H, W) to logits (B, num_classes), or to the invariants that are classified.

        Without pooling each place is classified, (B, num_classes, H, W).
        """
        x = super().forward_head(x, pre_logits)
        return x if self.global_pool else x.permute(0, 3, 1, 2)


class IsotropicConvNeXt(_ConvNeXt):
    """A ConvNeXt of one resolution; also the ordinary one, with the same keys and arguments.

    Args:
        embed_dim, depth: channels and number of blocks.
        equivariant: False for the ordinary twin.
        others: as in `ConvNeXt`.
    """

    stem_keys = r"^stem"

    def __init__(
        self,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pool = "avg",
        embed_dim: int = 384,
        depth: int = 18,
        *args: Any,
        init_scale: float = 0.0,
        **options: Any,
    ) -> None:
        check_sizes(embed_dim=embed_dim, depth=depth)
        sizes = ((depth,), (embed_dim,), patch_size, in_chans, num_classes, global_pool)
        super().__init__(*sizes, *args, init_scale=init_scale, **options)

    def _keep(self, stem, stages, dims, stride, **dd) -> None:
        self.stem = stem
        (self.blocks,) = stages
        symmetric = dims[0] // 2 if self.equivariant else None
        shape = dict(num_chs=dims[0], reduction=stride, symmetric_channels=symmetric)
        self.feature_info = [dict(module=f"blocks.{i}", **shape) for i in range(len(self.blocks))]

    def _stem(self, images: Tensor) -> Feature:
        x = self.stem(images)
        if self.equivariant:
            return tuple(part.contiguous() for part in x)
        return x.permute(0, 2, 3, 1).contiguous()


class ConvNeXt(_ConvNeXt):
    """The hierarchical ConvNeXt, equivariant; the stages are timm's.

    Args:
        depths, dims: blocks and channels of each stage.
        patch_size: of the stem.
        global_pool: average over the map, or none.
        kernel_size, mlp_ratio: as in `ConvBlock`.
        init_scale: initial LayerScale; none unless it is positive.
        img_size: checked if it is given; other sizes work too.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        others: as in `Classifier`.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        patch_size: Size = 4,
        *args: Any,
        init_scale: float = 1e-6,
        **options: Any,
    ) -> None:
        if len(depths) != len(dims) or not depths:
            raise ValueError(
                f"each stage has its depth and its width: depths {tuple(depths)} and dims "
                f"{tuple(dims)} must be equally many, and at least one"
            )
        check_sizes(depths=depths, dims=dims)
        super().__init__(
            depths, dims, patch_size, *args, equivariant=True, init_scale=init_scale, **options
        )

    def _keep(self, stem, stages, dims, stride, **dd) -> None:
        layers = [nn.Sequential(stem, LayerNorm(dims[0], **dd))]
        for before, dim in pairwise(dims):
            conv = MirrorConv2d(FLOP.regular(before), dim, (2, 2), (2, 2), **dd)
            layers.append(nn.Sequential(LayerNorm(before, **dd), conv))
        self.downsample_layers, self.stages = nn.ModuleList(layers), nn.ModuleList(stages)
        self.feature_info = [
            dict(
                module=f"stages.{i}",
                num_chs=dim,
                reduction=stride * 2**i,
                symmetric_channels=dim // 2,
            )
            for i, dim in enumerate(dims)
        ]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning rates; by stage if `coarse`."""
        return {
            "stem": r"^downsample_layers\.0",
            "blocks": r"^(?:downsample_layers|stages)\.(\d+)"
            if coarse
            else [
                (r"^downsample_layers\.(\d+)", (0,)),
                (r"^stages\.(\d+)\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def _stem(self, images: Tensor) -> Feature:
        return self.downsample_layers[0](images)

    def _steps(self) -> list[list[nn.Module]]:
        steps = []
        for i, stage in enumerate(self.stages):
            # called whole, for hooks and wrappers, unless each block is recomputed by itself
            modules = list(stage.children()) if self.grad_checkpointing else [stage]
            steps.append([self.downsample_layers[i], *modules] if i > 0 else modules)
        return steps

    def _truncate(self, steps: int) -> None:
        self.downsample_layers = self.downsample_layers[:steps]
        self.stages = self.stages[:steps]


ISOTROPIC_SIZES = {
    "small": dict(depth=18, embed_dim=384),
    "base": dict(depth=18, embed_dim=768),
    "large": dict(depth=36, embed_dim=1024),
}
SIZES = {
    "tiny": dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "small": dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "base": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "large": dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    "xlarge": dict(depths=(3, 3, 27, 3), dims=(256, 512, 1024, 2048)),
}

for _family, _equivariant in {"d2_convnext_isotropic": True, "convnext_isotropic": False}.items():
    register_sizes(
        __name__,
        IsotropicConvNeXt,
        {
            f"{_family}_{name}": {**size, "equivariant": _equivariant}
            for name, size in ISOTROPIC_SIZES.items()
        },
        cfg={
            "first_conv": ("stem.proj_sym", "stem.proj_asym") if _equivariant else "stem",
            "pool_size": (14, 14),
        },
        filter_fn=adapt_state,
    )
register_sizes(
    __name__,
    ConvNeXt,
    {f"d2_convnext_{name}": size for name, size in SIZES.items()},
    cfg={
        "first_conv": ("downsample_layers.0.0.proj_sym", "downsample_layers.0.0.proj_asym"),
        "pool_size": (7, 7),
    },
    out_indices=(0, 1, 2, 3),
)
