"""Equivariant perceptrons over tokens and channels (ResMLP).

Mixing tokens is a linear map too, so the token axis is decomposed as the channels are. Inside the
network features are parts s and a of (B, N, C/2), each with its symmetric tokens first, then its
antisymmetric ones. Entries are named by channel irrep and token irrep; flopping negates sa and as:

                            s  |  a
    tokens symmetric       ss  |  as
    tokens antisymmetric   sa  |  aa

`forward_features` gives the invariant features that are classified: ss and aa, and with
`use_symmetrized_asym_feats` |sa| and |as|.

Source: arXiv:2502.05169, section 4; ResMLP, arXiv:2105.03404.
"""

# no postponed annotations: symbolic tracers copy those of forward into the code they generate
from typing import Any

import torch
from torch import Tensor, nn

from deit.groups import FLOP
from deit.layers import MirrorHalves, MixerBlock, OrdinaryAffine, PatchEmbed
from deit.models.base import Classifier, Feature, Pool, Size, check_sizes, pack
from deit.models.registry import register_sizes


class ResMLP(Classifier):
    """A ResMLP that is equivariant under flopping.

    Args:
        img_size, patch_size: one number or (height, width). The maps over tokens are as large as
            the grid, so a network takes images of this size alone.
        global_pool: average over tokens, or none.
        init_scale: initial LayerScale.
        proj_drop_rate: dropout in the channel perceptrons.
        drop_path_rate: stochastic depth, the same for all blocks.
        others: as in `Classifier`; s there is [ss, aa] here, and a is [as, sa].
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pool = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        *,
        init_scale: float = 1e-4,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **head: Any,
    ) -> None:
        super().__init__(in_chans, num_classes, global_pool, equivariant=True, **head)
        check_sizes(embed_dim=embed_dim, depth=depth, img_size=img_size, patch_size=patch_size)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim = embed_dim

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
        shape = dict(num_chs=embed_dim, reduction=self.patch_embed.feat_ratio())
        self.feature_info = [
            dict(module=f"blocks.{i}", **shape, symmetric_channels=channels.invariant)
            for i in range(depth)
        ]
        self._build_head(embed_dim, OrdinaryAffine, **dd)

    def _embed(self, images: Tensor) -> Feature:
        """Images to parts with decomposed tokens, (B, N, C/2)."""
        return tuple(self.tokens.from_regular(part, 1) for part in self.patch_embed(images))

    def _to_map(self, x: Feature) -> Tensor:
        image = self.patch_embed.grid.to_image_order(self.tokens.to_regular(pack(x), 1))
        return image.permute(0, 3, 1, 2).contiguous()

    def _finish(self, x: Feature) -> Tensor:
        """Parts with decomposed tokens to (B, N, num_features).

        The N rows are invariant entries of the token axis, and no places.
        """
        (ss, sa), (as_, aa) = (self.tokens.split(part, 1) for part in x)
        y = torch.cat([ss, aa], 1)
        if not self.use_symmetrized_asym_feats:
            return y
        return torch.cat([y, torch.cat([as_, sa], 1).abs()], -1)

    def pool(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, C) or without pooling the same shape, normalised."""
        # before the norm, which is affine here and commutes with a mean
        return self.norm(x.mean(1) if self.global_pool == "avg" else x)


SIZES = {
    "12": dict(embed_dim=384, depth=12, init_scale=0.1),
    "24": dict(embed_dim=384, depth=24, init_scale=1e-5),
    "B_24": dict(embed_dim=768, depth=24, init_scale=1e-6),
    "L_24": dict(embed_dim=1280, depth=24, init_scale=1e-6),
}

register_sizes(
    __name__,
    ResMLP,
    {f"resmlp_equi_d2_{name}": size for name, size in SIZES.items()},
    cfg={
        "first_conv": ("patch_embed.proj_sym", "patch_embed.proj_asym"),
        "fixed_input_size": True,
    },
)
