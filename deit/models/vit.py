"""Vision transformers (DeiT III): equivariant, hybrid and invariant-early.

One class builds all three: so many equivariant blocks, then a bridge, then ordinary blocks.
Equivariant features are parts s and a of (B, N, C/2), with tokens in mirror order. What leaves the
network is in the ordinary order, row-major and left to right. `forward_features` and `forward_head`
give the invariant features that are classified: s of width C/2 (`num_features`), or [s, |a|] with
`use_symmetrized_asym_feats`.

Source: arXiv:2502.05169, section 4; DeiT III, arXiv:2204.07118.
"""

# no postponed annotations: symbolic tracers copy those of forward into the code they generate
from typing import Any, Literal

import torch
from timm.models._input import update_model_input_size
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from deit.layers import (
    Block,
    Dropout,
    InvariantBridge,
    LayerNorm,
    MirrorGrid,
    MirrorOrder,
    OrdinaryBlock,
    OrdinaryLayerNorm,
    PatchEmbed,
    PositionEmbedding,
    PrefixToken,
    RegularBridge,
    tracing,
)
from deit.layers.tokens import resample
from deit.models.base import Classifier, Feature, Pool, Size, check_sizes, pack
from deit.models.registry import register_sizes

BRIDGES = {"regular": RegularBridge, "invariant": InvariantBridge}


class VisionTransformer(Classifier):
    """A vision transformer whose first blocks are equivariant under flopping.

    Args:
        img_size, patch_size: one number or (height, width).
        global_pool: class token, average over patches, or none.
        bridge: None if all blocks are equivariant. Otherwise the first `break_layer` are, and the
            pair becomes one vector by "regular", [(s + a)/sqrt 2, (s - a)/sqrt 2], or by
            "invariant", [s, |a|].
        break_layer: number of blocks before the bridge, 0 to depth; depth // 2 by default.
        init_scale: initial LayerScale.
        class_token, reg_tokens: tokens that belong to no patch.
        dynamic_img_size: accept any image that the patches tile.
        pos_drop_rate, ..., drop_path_rate: as in timm; `drop_path_rate` is the same for all blocks.
        use_attn_mixer, use_fused_attn: see `Attention`.
        others: as in `Classifier`.
    """

    pools = ("token", "avg", "")
    norm_of_head = False
    stem_keys = r"^cls_token|^reg_token|^pos_embed|^patch_embed"

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pool = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        bridge: Literal["regular", "invariant"] | None = None,
        break_layer: int | None = None,
        qkv_bias: bool = True,
        init_scale: float = 1e-4,
        class_token: bool = True,
        reg_tokens: int = 0,
        dynamic_img_size: bool = False,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        use_attn_mixer: bool = False,
        use_fused_attn: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **head: Any,
    ) -> None:
        super().__init__(in_chans, num_classes, global_pool, equivariant=bridge is None, **head)
        check_sizes(img_size=img_size, patch_size=patch_size)
        check_sizes(embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim = embed_dim
        self.has_class_token = class_token
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.dynamic_img_size = dynamic_img_size
        self.equivariant_depth = _depth_of_bridge(bridge, break_layer, depth)

        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, strict_img_size=not dynamic_img_size, **dd
        )
        self.patch_embed.flatten_and_permute = MirrorOrder(self.patch_embed.grid, device)
        self.cls_token = PrefixToken(embed_dim, 1, **dd) if class_token else None
        self.reg_token = PrefixToken(embed_dim, reg_tokens, **dd) if reg_tokens else None
        self.pos_embed = PositionEmbedding(embed_dim, self.patch_embed.grid, **dd)
        self.pos_drop = Dropout(pos_drop_rate)

        shared: dict[str, Any] = dict(
            qkv_bias=qkv_bias,
            init_values=init_scale,
            proj_drop=proj_drop_rate,
            attn_drop=attn_drop_rate,
            drop_path=drop_path_rate,
            use_fused_attn=use_fused_attn,
            **dd,
        )
        self.blocks = nn.Sequential(
            *(
                Block(embed_dim, num_heads, mlp_ratio, use_attn_mixer=use_attn_mixer, **shared)
                if i < self.equivariant_depth
                else OrdinaryBlock(embed_dim, num_heads, mlp_ratio, **shared)
                for i in range(depth)
            )
        )
        self.bridge = None if bridge is None else BRIDGES[bridge](embed_dim)
        symmetric = [embed_dim // 2] * self.equivariant_depth
        after = embed_dim if bridge == "invariant" else None
        shape = dict(num_chs=embed_dim, reduction=self.patch_embed.feat_ratio())
        self.feature_info = [
            dict(module=f"blocks.{i}", **shape, symmetric_channels=count)
            for i, count in enumerate(symmetric + [after] * (depth - self.equivariant_depth))
        ]
        self.invariants = InvariantBridge(embed_dim) if self.use_symmetrized_asym_feats else None
        self._build_head(embed_dim, LayerNorm if bridge is None else OrdinaryLayerNorm, **dd)

    def _check_pool(self, pool: str) -> str:
        if pool == "token" and not self.has_class_token:
            raise ValueError("global_pool 'token' needs class_token=True; use 'avg' without one")
        return super()._check_pool(pool)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond those of one dimension."""
        return {"pos_embed.0", "pos_embed.1", "cls_token.0", "reg_token.0"}

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change the image or the patch size for good: position embedding and patch kernels are
        resampled, and stay exactly equivariant.

        Raises:
            ValueError: if the patches do not tile the image; nothing is changed then.
        """
        check_sizes(img_size=img_size, patch_size=patch_size)
        self.patch_embed.set_input_size(img_size, patch_size)
        grid = self.patch_embed.grid
        if grid != self.pos_embed.grid:
            device = self.pos_embed.get_parameter("0").device
            self.patch_embed.flatten_and_permute = MirrorOrder(grid, device)
            self.pos_embed.set_grid(grid)
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    # forward

    def _grid(self, images: Tensor) -> MirrorGrid:
        if not self.dynamic_img_size:
            return self.patch_embed.grid
        tracing.check_images(images, self.in_chans)
        return self.patch_embed.grid_for(images.shape[-2], images.shape[-1])

    def _embed(self, images: Tensor) -> Feature:
        """Patches with their positions after the prefix tokens, parts (B, prefix + N, C/2)."""
        x = self.patch_embed(images)
        # its own grid otherwise: `patch_embed` may be wrapped, and have no grid to ask for
        positions = self.pos_embed(self._grid(images) if self.dynamic_img_size else None)
        batch = x[0].shape[0]
        prefix = [t(batch) for t in (self.cls_token, self.reg_token) if t is not None]
        x = [part + position for part, position in zip(x, positions, strict=True)]
        if prefix:
            x = [torch.cat(own, 1) for own in zip(*prefix, x, strict=True)]
        return self.pos_drop(tuple(x))

    def _steps(self) -> list[list[nn.Module]]:
        steps = super()._steps()
        if self.bridge is not None and self.equivariant_depth < len(steps):
            steps[self.equivariant_depth].insert(0, self.bridge)
        return steps

    def _normalize(self, x: Feature) -> Feature:
        """The final norm, and the bridge if that is still ahead."""
        if self.bridge is not None and isinstance(x, tuple):
            x = self.bridge(x)
        return self.norm(x)

    def _finish(self, x: Feature) -> Tensor:
        """Tokens after the last block to the invariant features that are classified."""
        x = self._normalize(x)
        x = pack(x) if self.invariants is None else self.invariants(x)
        return x[..., : self.num_features]

    def _to_image_order(self, x: Tensor, grid: MirrorGrid) -> Tensor:
        """Patch tokens from mirror order to row-major order; prefix tokens stay first."""
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return torch.cat([prefix, grid.to_image_order(patches).flatten(1, 2)], 1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to normalised invariant tokens, prefix first, patches row-major.

        (B, in_chans, H, W) -> (B, prefix + N, num_features)
        """
        grid = self._grid(x)
        return self._to_image_order(super().forward_features(x), grid)

    def pool(self, x: Tensor) -> Tensor:
        """(B, prefix + N, C) to (B, C), or all tokens if pooling is off."""
        return global_pool_nlc(x, self.global_pool, num_prefix_tokens=self.num_prefix_tokens)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, num_classes)
        images = x
        x, _ = self._run(images)
        if self.global_pool == "token":  # the head sees no other token, so no other is normalised
            x = tuple(part[:, :1] for part in x) if isinstance(x, tuple) else x[:, :1]
        x = self._finish(x)
        if not self.global_pool:  # only then the order of the tokens is seen outside
            x = self._to_image_order(x, self._grid(images))
        return self.forward_head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Features after chosen blocks, as timm's VisionTransformer returns them.

        Maps are (B, C, H, W) or tokens (B, N, C), left to right, with all channels. Of a hybrid,
        `norm` passes intermediates from before the bridge through it, because the norm stands
        behind it. The final features are those of `forward_features`.
        """
        grid = self._grid(x)
        x, taken = self._run_and_take(x, indices, stop_early, output_fmt)
        if norm:
            taken = [self._normalize(y) for y in taken]
        taken = [self._to_image_order(pack(y), grid) for y in taken]
        prefixes = [y[:, : self.num_prefix_tokens] for y in taken]
        maps = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            size = (grid.height, grid.width)
            maps = [y.mT.unflatten(-1, size).contiguous() for y in maps]
        result: dict[str, Any] = {"image_intermediates": maps}
        if return_prefix_tokens and self.num_prefix_tokens > 0:
            result["image_intermediates_prefix"] = prefixes
            if not output_dict:
                maps = list(zip(maps, prefixes, strict=True))
        if intermediates_only:
            return result if output_dict else maps
        features = self._to_image_order(self._finish(x), grid)
        return {**result, "image_features": features} if output_dict else (features, maps)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """Intermediates by the interface of DINO; `n` as `indices` of forward_intermediates."""
        output_fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt=output_fmt, intermediates_only=True
        )


def _depth_of_bridge(bridge: str | None, break_layer: int | None, depth: int) -> int:
    """The number of equivariant blocks."""
    if bridge is not None and bridge not in BRIDGES:
        raise ValueError(f"bridge {bridge!r} is not known: use {', '.join(BRIDGES)} or None")
    if bridge is None and break_layer is not None:
        raise ValueError(
            "break_layer says where the bridge of a hybrid or invariant-early network stands, "
            "and this network has none"
        )
    default = depth if bridge is None else depth // 2
    blocks = default if break_layer is None else break_layer
    if not 0 <= blocks <= depth:
        raise ValueError(f"break_layer {blocks} is not among the {depth} blocks: 0 to {depth}")
    return blocks


def checkpoint_filter_fn(
    state_dict: dict[str, Tensor], model: VisionTransformer
) -> dict[str, Tensor]:
    """Fit a checkpoint of another image size to `model`: positions are resampled equivariantly.

    The old grid is read off the stored token order. Other tensors pass through.
    """
    state_dict = dict(state_dict.get("model", state_dict))
    key = "patch_embed.flatten_and_permute.permutation"
    new = model.patch_embed.grid
    if key not in state_dict or "pos_embed.0" not in state_dict:
        return state_dict
    old = MirrorGrid.from_permutation(state_dict[key])
    if old != new:
        sym, asym = state_dict["pos_embed.0"], state_dict["pos_embed.1"]
        state_dict["pos_embed.0"], state_dict["pos_embed.1"] = resample(sym, asym, old, new)
        state_dict[key] = new.permutation()
    return state_dict


SIZES = {
    "tiny_patch16_LS": dict(embed_dim=192, depth=12, num_heads=3, patch_size=16),
    "small_patch16_LS": dict(embed_dim=384, depth=12, num_heads=6, patch_size=16),
    "medium_patch16_LS": dict(embed_dim=512, depth=12, num_heads=8, patch_size=16),
    "base_patch16_LS": dict(embed_dim=768, depth=12, num_heads=12, patch_size=16),
    "large_patch16_LS": dict(embed_dim=1024, depth=24, num_heads=16, patch_size=16),
    "huge_patch14_LS": dict(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
    "huge_patch14_52_LS": dict(embed_dim=1280, depth=52, num_heads=16, patch_size=14),
}
FAMILIES = {"d2_deit": None, "hybrid_deit": "regular", "d2_inv_early_deit": "invariant"}

register_sizes(
    __name__,
    VisionTransformer,
    {
        f"{family}_{name}": {**size, "bridge": bridge}
        for family, bridge in FAMILIES.items()
        for name, size in SIZES.items()
    },
    cfg={
        "first_conv": ("patch_embed.proj_sym", "patch_embed.proj_asym"),
        "fixed_input_size": True,
    },
    filter_fn=checkpoint_filter_fn,
)
