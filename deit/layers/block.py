"""The pre-norm transformer block on features in parts (arXiv:2502.05169, section 4)."""

from typing import Any

import torch
from torch import Tensor, nn

from deit.groups import FLOP, Group
from deit.layers.affine import LayerScale
from deit.layers.attention import Attention
from deit.layers.drop import DropPath
from deit.layers.mlp import Mlp
from deit.layers.norm import LayerNorm


def add(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The sum of two features, part by part."""
    return tuple(p + q for p, q in zip(x, y, strict=True))


class Block(nn.Module):
    """x + gamma_1(attn(norm1 x)), then x + gamma_2(mlp(norm2 x)), on parts (B, N, C / 2).

    Hooks on it, and on the equivariant layers inside, are given tuples of parts. torch gives full
    backward hooks the gradients of outputs, but none of an argument that is a tuple; hooks on the
    `nn.Linear` of each irrep get both. With fused attention `attn_drop` is not called, as in timm.

    Args:
        init_values: initial LayerScale.
        proj_drop: dropout rate after linear maps.
        drop_path: rate of stochastic depth; it draws one mask a sample, for all irreps.
        group, device, dtype: of every layer.
        attention: further options of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        init_values: float = 1e-4,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        group: Group = FLOP,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"group": group, "device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, **options)
        self.attn = Attention(dim, num_heads, proj_drop=proj_drop, **attention, **options)
        self.gamma_1 = LayerScale(dim, init_values, **options)
        self.norm2 = LayerNorm(dim, **options)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **options)
        self.gamma_2 = LayerScale(dim, init_values, **options)
        self.drop_path1 = DropPath(drop_path)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = add(x, self.drop_path1(self.gamma_1(self.attn(self.norm1(x)))))
        return add(x, self.drop_path2(self.gamma_2(self.mlp(self.norm2(x)))))
