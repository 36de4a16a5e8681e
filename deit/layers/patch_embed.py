"""Patch embedding: an image to tokens (arXiv:2502.05169, section 3)."""

from math import sqrt
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor

from deit.groups import FLOP, Rep
from deit.layers import tracing
from deit.layers.conv import MirrorConv2d, MirrorKernel
from deit.layers.tokens import MirrorGrid


class PatchEmbed(MirrorConv2d):
    """Convolution with kernel = stride = patch size: (B, in_chans, H, W) to parts (B, N, C/2).

    Tokens come in mirror order, see `MirrorGrid`. Keys: `proj_sym.weight`, `proj_asym.weight`
    (C/2, in_chans, p, p/2) and `proj_sym.bias`.

    Args:
        img_size, patch_size: one number or (height, width).
        scale: factor on the output. With mirror-(anti)symmetric kernels built from halves, root
            one half gives the output the scale of an ordinary patch embedding.
        strict_img_size: refuse images of other sizes than `img_size`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        scale: float = sqrt(0.5),
        strict_img_size: bool = True,
        **dd: Any,
    ) -> None:
        patch_size = to_2tuple(patch_size)
        colours = Rep(FLOP, free=0, fixed=in_chans)
        super().__init__(colours, embed_dim, patch_size, patch_size, scale=scale, **dd)
        self.patch_size = patch_size
        self.strict_img_size = strict_img_size
        self.img_size = to_2tuple(img_size)
        self.grid = self.grid_for(*self.img_size)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Use images or patches of another size; None leaves a size as it is.

        Raises:
            ValueError: if the patches do not tile the image; nothing is changed then.
        """
        patches = self.patch_size if patch_size is None else to_2tuple(patch_size)
        height, width = self.img_size if img_size is None else to_2tuple(img_size)
        self.grid = self.grid_for(height, width, patches)
        self.img_size = (height, width)
        if patches != self.patch_size:
            self.patch_size = self.kernel_size = self.stride = patches
            for layer in self.children():
                if isinstance(layer, MirrorKernel):
                    layer.resize(patches)

    def grid_for(
        self, height: int, width: int, patch_size: tuple[int, int] | None = None
    ) -> MirrorGrid:
        """The token grid of an image; raises ValueError if the patches do not tile it."""
        ph, pw = patch_size or self.patch_size
        if height % ph or width % pw or height < ph or width < pw:
            raise ValueError(
                f"an image of {height} x {width} pixels cannot be cut into patches of {ph} x {pw}: "
                f"use multiples, for example {max(round(height / ph), 1) * ph} x "
                f"{max(round(width / pw), 1) * pw}"
            )
        return MirrorGrid(height // ph, width // pw)

    @property
    def grid_size(self) -> tuple[int, int]:
        return (self.grid.height, self.grid.width)

    @property
    def num_patches(self) -> int:
        return self.grid.height * self.grid.width

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels a token, as timm's PatchEmbed tells it."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Grid of an image of another size, as timm's PatchEmbed tells it."""
        grid = self.grid_for(*img_size)
        return (grid.height, grid.width)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        height, width = x.shape[-2], x.shape[-1]
        if self.strict_img_size:
            tracing.check_image_size(height, width, *self.img_size)
            grid = self.grid
        else:
            grid = self.grid_for(height, width)
        return tuple(grid.to_mirror_order(part) for part in super().forward(x))
