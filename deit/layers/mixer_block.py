"""Blocks of multi-layer perceptrons over tokens and channels: the equivariant and the ordinary one.

Source: arXiv:2502.05169, section 4; ResMLP, arXiv:2105.03404.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath
from timm.layers import Mlp as OrdinaryMlp
from torch import Tensor, nn

from deit.groups import Rep
from deit.layers import fused
from deit.layers.activation import quick_gelu
from deit.layers.affine import Affine, LayerScale, OrdinaryAffine
from deit.layers.linear import Linear
from deit.layers.mlp import Mlp

__all__ = ["MixerBlock", "OrdinaryMixerBlock"]


class MixerBlock(nn.Module):
    """x + gamma_1(mix(norm1 x)), then x + gamma_2(mlp(norm2 x)), on (B, N, C) packed in both axes.

    `mix` is a Linear over the tokens (key `attn`), `mlp` is over the channels; each leaves the
    other axis alone, and both have shifts on the parts that the group leaves alone.

    Args:
        channels, tokens: the representations along the last axis and the one before it.
        init_values: initial LayerScale.
        drop: dropout rate in the perceptron.
        drop_path: rate of stochastic depth; it draws one mask a sample, for all irreps.
    """

    def __init__(
        self,
        channels: Rep,
        tokens: Rep,
        mlp_ratio: float = 4.0,
        *,
        init_values: float = 1e-4,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = Affine(channels, across=tokens, **dd)
        self.attn = Linear(tokens, tokens, across=channels, prefix="lin", **dd)
        self.gamma_1 = LayerScale(channels, init_values, **dd)
        self.norm2 = Affine(channels, across=tokens, **dd)
        self.mlp = Mlp(
            channels,
            int(channels.size * mlp_ratio),
            act=quick_gelu,
            drop=drop,
            across=tokens,
            prefix="lin",
            **dd,
        )
        self.gamma_2 = LayerScale(channels, init_values, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C)
        x = x + self.drop_path(self.gamma_1(self._mix(self.norm1(x))))
        return x + self.drop_path(self.gamma_2(self.mlp(self.norm2(x))))

    def _mix(self, x: Tensor) -> Tensor:
        y = fused.mix_tokens(x, self.attn)
        return self.attn(x.mT).mT if y is None else y


class OrdinaryMixerBlock(nn.Module):
    """timm's ResBlock under the published keys; serves as `block_layer` of timm's MlpMixer.

    Args:
        dim, seq_len: C and N.
        init_values: initial LayerScale.
        drop, drop_path: as in `MixerBlock`.
        mlp_layer, norm_layer, act_layer: timm's; the defaults are those of ResMLP.
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        mlp_ratio: float = 4.0,
        mlp_layer: type[nn.Module] = OrdinaryMlp,
        norm_layer: type[nn.Module] = OrdinaryAffine,
        act_layer: type[nn.Module] = nn.GELU,
        init_values: float = 1e-4,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.init_values = init_values
        self.norm1 = norm_layer(dim, **dd)
        self.attn = nn.Linear(seq_len, seq_len, **dd)
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values, **dd))
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop, **dd)
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def reset_parameters(self) -> None:
        """LayerScale's initial value; the submodules reset themselves."""
        nn.init.constant_(self.gamma_1, self.init_values)
        nn.init.constant_(self.gamma_2, self.init_values)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C)
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x).mT).mT)
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))
