"""ConvNeXt: equivariant, isotropic (one resolution) and hierarchical (four stages).

Inside, features are parts with channels last, s and a of (B, H, W, C/2). Maps leave the network
packed, as (B, C, H, W) (`forward_intermediates`, `features_only=True`, `forward_features`).
Flopping the image flips them, leaves channels [0, C/2) alone and negates channels [C/2, C);
`feature_info[i]["symmetric_channels"]` says how many are left alone. The head classifies means of
s, and with `use_symmetrized_asym_feats` of |a| too.

The networks are fully convolutional. Flopping maps the kernels' positions to one another, and the
network is exactly equivariant, if the width of an image is a multiple of the total stride; another
width is an error. The height is free.

timm has the ordinary hierarchical networks under the names `convnext_*`; the ordinary isotropic
ones are here.

Source: arXiv:2502.05169, section 4; ConvNeXt, arXiv:2201.03545.
"""

# no postponed annotations: symbolic tracers copy those of forward into the code they generate
from collections.abc import Sequence
from itertools import islice
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
    """What both have in common: channels are last, and means are normalised and classified."""

    drawn = (nn.Linear, nn.Conv2d, MirrorKernel)

    def __init__(
        self,
        in_chans: int,
        img_size: Size | None,
        equivariant: bool,
        use_symmetrized_asym_feats: bool,
        total_stride: int,
    ) -> None:
        super().__init__()
        if use_symmetrized_asym_feats and not equivariant:
            raise ValueError(
                "use_symmetrized_asym_feats needs equivariant features: an ordinary network has "
                "no antisymmetric part"
            )
        if img_size is not None and equivariant:
            height, width = to_2tuple(img_size)
            tracing.check_total_stride(height, width, total_stride)
        self.in_chans = in_chans
        self.equivariant = equivariant
        self.use_symmetrized_asym_feats = use_symmetrized_asym_feats

    def _make_stem(self, dim: int, patch_size: tuple[int, int], **dd: Any) -> nn.Module:
        """A convolution whose stride is its size."""
        if not self.equivariant:
            return nn.Conv2d(self.in_chans, dim, patch_size, patch_size, **dd)
        # the factor gives kernels built from halves the scale of ordinary ones
        colours = Rep(FLOP, free=0, fixed=self.in_chans)
        return MirrorConv2d(colours, dim, patch_size, patch_size, scale=sqrt(0.5), **dd)

    def _set_channels(self, channels: int) -> None:
        super()._set_channels(channels)
        self.num_features = channels
        self.invariants = InvariantBridge(channels) if self.use_symmetrized_asym_feats else None

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
        equivariant: False for the ordinary twin.
        num_classes: 0 for no classifier.
        global_pool: average over the map, or none.
        img_size: checked if it is given; other sizes work too.
        layer_scale_init_value: initial LayerScale; none unless it is positive.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        use_symmetrized_asym_feats: classify the means of [s, |a|] in place of s.
        head_init_scale: factor on the classifier's initial weights.

    Raises:
        ValueError: for sizes that do not divide and options that exclude each other.
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
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        *,
        equivariant: bool = True,
        img_size: Size | None = None,
        layer_scale_init_value: float = 0.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        use_symmetrized_asym_feats: bool = False,
        head_init_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(in_chans=in_chans, embed_dim=embed_dim, depth=depth)
        check_sizes(patch_size=patch_size, num_classes=num_classes)
        patch_size = to_2tuple(patch_size)
        super().__init__(in_chans, img_size, equivariant, use_symmetrized_asym_feats, patch_size[1])
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = self._make_stem(embed_dim, patch_size, **dd)
        block = ConvBlock if equivariant else OrdinaryConvBlock
        scale = layer_scale_init_value
        self.blocks = nn.Sequential(
            *(
                block(embed_dim, kernel_size, mlp_ratio, init_value=scale, drop_path=rate, **dd)
                for rate in _rising(drop_path_rate, depth)
            )
        )
        symmetric = embed_dim // 2 if equivariant else None
        self.feature_info = [
            self._describe(f"blocks.{i}", embed_dim, patch_size[1], symmetric) for i in range(depth)
        ]
        self._set_channels(embed_dim)
        self.norm = OrdinaryLayerNorm(self.head_hidden_size, **dd)
        self._init_head(num_classes, global_pool, drop_rate, head_init_scale, **dd)

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
        img_size: checked if it is given; other sizes work too.
        layer_scale_init_value: initial LayerScale; none unless it is positive.
        others: as in `IsotropicConvNeXt`.

    Raises:
        ValueError: for sizes that do not divide.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        patch_size: Size = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pool = "avg",
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        *,
        img_size: Size | None = None,
        layer_scale_init_value: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        use_symmetrized_asym_feats: bool = False,
        head_init_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(depths) != len(dims) or not depths:
            raise ValueError(
                f"each stage has its depth and its width: depths {tuple(depths)} and dims "
                f"{tuple(dims)} must be equally many, and at least one"
            )
        check_sizes(in_chans=in_chans, depths=depths, dims=dims)
        check_sizes(patch_size=patch_size, num_classes=num_classes)
        patch_size = to_2tuple(patch_size)
        strides = [patch_size[1] * 2**i for i in range(len(depths))]
        super().__init__(in_chans, img_size, True, use_symmetrized_asym_feats, strides[-1])
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        self.feature_info = []
        scale = layer_scale_init_value
        rates = iter(_rising(drop_path_rate, sum(depths)))
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            if i == 0:
                layers = [self._make_stem(dim, patch_size, **dd), LayerNorm(dim, **dd)]
            else:
                before = FLOP.regular(dims[i - 1])
                conv = MirrorConv2d(before, dim, (2, 2), (2, 2), **dd)
                layers = [LayerNorm(before, **dd), conv]
            self.downsample_layers.append(nn.Sequential(*layers))
            blocks = (
                ConvBlock(dim, kernel_size, mlp_ratio, init_value=scale, drop_path=rate, **dd)
                for rate in islice(rates, depth)
            )
            self.stages.append(nn.Sequential(*blocks))
            self.feature_info.append(self._describe(f"stages.{i}", dim, strides[i], dim // 2))
        self._set_channels(dims[-1])
        self.norm = OrdinaryLayerNorm(self.head_hidden_size, **dd)
        self._init_head(num_classes, global_pool, drop_rate, head_init_scale, **dd)

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


def _rising(rate: float, count: int) -> list[float]:
    """`count` rates rising linearly from 0 to `rate`."""
    return [rate * i / max(count - 1, 1) for i in range(count)]


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
        layer_scale="layer_scale_init_value",
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
    layer_scale="layer_scale_init_value",
    out_indices=(0, 1, 2, 3),
)
