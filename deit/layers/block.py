"""Pre-norm transformer blocks: the equivariant one, and the ordinary one of the same key names."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from deit.groups import FLOP, Group
from deit.layers.affine import LayerScale
from deit.layers.attention import Attention
from deit.layers.drop import DropPath
from deit.layers.mlp import Mlp
from deit.layers.norm import LayerNorm

__all__ = ["Block", "OrdinaryBlock", "OrdinaryLayerNorm", "add"]

# the ordinary layers of all these networks use this eps, not torch's 1e-5
OrdinaryLayerNorm = partial(nn.LayerNorm, eps=1e-6)


def add(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The sum of two features, part by part."""
    return tuple(p + q for p, q in zip(x, y, strict=True))


class Block(nn.Module):
    """x + gamma_1(attn(norm1 x)), then x + gamma_2(mlp(norm2 x)), on parts (B, N, C / 2).

    Hooks on it, and on the equivariant layers inside, are given tuples of parts. torch gives full
    backward hooks the gradients of outputs, but none of an argument that is a tuple; hooks on the
    `nn.Linear` of each irrep get both. With fused attention `attn_drop` is not called, as in timm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        qkv_bias: bool = True,
        init_values: float = 1e-4,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        use_fused_attn: bool | None = None,
        use_attn_mixer: bool = False,
        group: Group = FLOP,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = dict(group=group, device=device, dtype=dtype)
        self.norm1 = LayerNorm(dim, **options)
        self.attn = Attention(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            use_fused_attn=use_fused_attn,
            use_attn_mixer=use_attn_mixer,
            **options,
        )
        self.gamma_1 = LayerScale(dim, init_values, **options)
        self.norm2 = LayerNorm(dim, **options)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **options)
        self.gamma_2 = LayerScale(dim, init_values, **options)
        self.drop_path1 = DropPath(drop_path)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = add(x, self.drop_path1(self.gamma_1(self.attn(self.norm1(x)))))
        return add(x, self.drop_path2(self.gamma_2(self.mlp(self.norm2(x)))))


class OrdinaryBlock(TimmBlock):
    """timm's block with LayerScale under the published keys `gamma_1`, `gamma_2`.

    Takes timm's arguments, so that it serves as `block_fn` of timm's VisionTransformer.

    Args:
        init_values: initial LayerScale; None for none.
        use_fused_attn: as in `Attention`; None leaves the choice to timm.
    """

    attn: Any  # with `fused_attn`
    gamma_1: nn.Parameter  # None without LayerScale
    gamma_2: nn.Parameter

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        qkv_bias: bool = True,
        init_values: float | None = 1e-4,
        norm_layer: Any = OrdinaryLayerNorm,
        use_fused_attn: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim, num_heads, mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm_layer, **kwargs, **dd
        )
        if use_fused_attn is not None:
            self.attn.fused_attn = use_fused_attn
        self.init_values = init_values
        for name in ("gamma_1", "gamma_2"):
            gamma = None if init_values is None else torch.full((dim,), init_values, **dd)
            self.register_parameter(name, None if gamma is None else nn.Parameter(gamma))

    def reset_parameters(self) -> None:
        """LayerScale's initial value; the submodules reset themselves."""
        if self.init_values is not None:
            nn.init.constant_(self.gamma_1, self.init_values)
            nn.init.constant_(self.gamma_2, self.init_values)

    @staticmethod
    def _scale(gamma: Tensor | None, x: Tensor) -> Tensor:
        return x if gamma is None else gamma * x

    def forward(self, x: Tensor, **attn_options) -> Tensor:  # (B, N, C)
        attended = self.attn(self.norm1(x), **attn_options)
        x = x + self.drop_path1(self._scale(self.gamma_1, attended))
        return x + self.drop_path2(self._scale(self.gamma_2, self.mlp(self.norm2(x))))
