"""Blocks of a depthwise convolution and a perceptron: the equivariant and the ordinary one.

Both keep channels last: the norm and the linear maps work on the last axis, and the depthwise
convolution sees a tensor in PyTorch's channels-last format without a copy.

Source: arXiv:2502.05169, section 4; ConvNeXt, arXiv:2201.03545.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath as TensorDropPath
from torch import Tensor, nn

from deit.layers.activation import GELU
from deit.layers.affine import LayerScale
from deit.layers.block import OrdinaryLayerNorm, add
from deit.layers.conv import MirrorDepthwiseConv2d
from deit.layers.drop import DropPath
from deit.layers.linear import Linear
from deit.layers.norm import LayerNorm

__all__ = ["ConvBlock", "OrdinaryConvBlock"]


class ConvBlock(nn.Module):
    """x + gamma(pwconv2(GELU(pwconv1(norm(dwconv x))))), on parts (B, H, W, C / 2).

    Args:
        dim: C, a multiple of 4.
        kernel_size: of the depthwise convolution, odd.
        init_value: initial LayerScale; no LayerScale unless it is positive.
        drop_path: rate of stochastic depth; it draws one mask a sample, for all irreps.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        *,
        init_value: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(dim * mlp_ratio)
        self.dwconv = MirrorDepthwiseConv2d(dim, kernel_size, **dd)
        self.norm = LayerNorm(dim, **dd)
        self.pwconv1 = Linear(dim, hidden, pointwise=True, **dd)
        self.act = GELU(hidden)
        self.pwconv2 = Linear(hidden, dim, pointwise=True, **dd)
        self.gamma = LayerScale(dim, init_value, **dd) if init_value > 0 else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x)))))
        if self.gamma is not None:
            y = self.gamma(y)
        return add(x, self.drop_path(y))


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution with channels last, (B, H, W, C_in) -> (B, H, W, C_out)."""

    def __init__(self, in_channels: int, out_channels: int, **kwargs) -> None:
        super().__init__(in_channels, out_channels, 1, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class OrdinaryConvBlock(nn.Module):
    """The ordinary block of the same keys and arguments, on (B, H, W, C); any C."""

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        mlp_ratio: float = 4.0,
        *,
        init_value: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(dim * mlp_ratio)
        self.init_value = init_value
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)
        self.norm = OrdinaryLayerNorm(dim, **dd)
        self.pwconv1 = PointwiseConv2d(dim, hidden, **dd)
        self.act = nn.GELU()
        self.pwconv2 = PointwiseConv2d(hidden, dim, **dd)
        self.gamma = nn.Parameter(torch.full((dim,), init_value, **dd)) if init_value > 0 else None
        self.drop_path = TensorDropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.register_load_state_dict_pre_hook(_read_layer_scale)

    def reset_parameters(self) -> None:
        """LayerScale's initial value; the submodules reset themselves."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.init_value)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        y = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y)


def _read_layer_scale(module: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    """Published files hold it for (B, C, H, W), as (1, C, 1, 1)."""
    key = f"{prefix}gamma"
    if key in state and state[key].ndim == 4:
        state[key] = state[key].flatten()
