"""The block of a depthwise convolution and a perceptron, on features in parts.

Channels are last: the norm and the linear maps work on the last axis, and the depthwise convolution
sees a tensor in PyTorch's channels-last format without a copy.

Source: arXiv:2502.05169, section 4; ConvNeXt, arXiv:2201.03545.
"""

from typing import Any

from torch import Tensor, nn

from deit.layers.activation import GELU
from deit.layers.affine import LayerScale
from deit.layers.block import add
from deit.layers.conv import MirrorDepthwiseConv2d
from deit.layers.drop import DropPath
from deit.layers.linear import Linear
from deit.layers.norm import LayerNorm


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
        **dd: Any,
    ) -> None:
        super().__init__()
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
        return add(x, self.drop_path(y if self.gamma is None else self.gamma(y)))
