"""The ordinary layers that equivariant ones are compared with: timm's blocks, published keys.

Source: DeiT III, arXiv:2204.07118; ResMLP, arXiv:2105.03404; ConvNeXt, arXiv:2201.03545.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

# the ordinary layers of all these networks use this eps, not torch's 1e-5
OrdinaryLayerNorm = partial(nn.LayerNorm, eps=1e-6)


class OrdinaryAffine(nn.Module):
    """y = alpha * x + beta over the last axis, for invariant or ordinary features.

    Keys: `alpha`, `beta`, (features,), the published shapes; timm's Affine keeps (1, 1, features).
    """

    def __init__(self, features: int, **dd: Any) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(features, **dd))
        self.beta = nn.Parameter(torch.zeros(features, **dd))

    def reset_parameters(self) -> None:
        """Scale one, shift zero."""
        nn.init.ones_(self.alpha)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:  # (..., features), same shape
        return x * self.alpha + self.beta


class Scaled(nn.Module):
    """A block whose own parameters are LayerScales, (C,), of one initial value; None for none."""

    init_values: Any

    def _set_scales(self, names: tuple[str, ...], dim: int, value: float | None, **dd: Any) -> None:
        self.init_values = value
        for name in names:
            gamma = None if value is None else nn.Parameter(torch.full((dim,), value, **dd))
            self.register_parameter(name, gamma)

    def reset_parameters(self) -> None:
        """LayerScale's initial value; the submodules reset themselves."""
        for gamma in self.parameters(recurse=False):
            nn.init.constant_(gamma, self.init_values)

    @staticmethod
    def _scale(gamma: Any, x: Tensor) -> Tensor:
        return x if gamma is None else gamma * x


class OrdinaryBlock(Scaled, TimmBlock):
    """timm's block with LayerScale under the published keys `gamma_1`, `gamma_2`.

    Takes timm's arguments, so that it serves as `block_fn` of timm's VisionTransformer.

    Args:
        init_values: initial LayerScale; None for none.
        use_fused_attn: as in `Attention`; None leaves the choice to timm.
    """

    attn: Any  # with `fused_attn`

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
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim, num_heads, mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm_layer, **kwargs, **dd
        )
        if use_fused_attn is not None:
            self.attn.fused_attn = use_fused_attn
        self._set_scales(("gamma_1", "gamma_2"), dim, init_values, **dd)

    def forward(self, x: Tensor, **attn_options: Any) -> Tensor:  # (B, N, C)
        attended = self.attn(self.norm1(x), **attn_options)
        x = x + self.drop_path1(self._scale(self.gamma_1, attended))
        return x + self.drop_path2(self._scale(self.gamma_2, self.mlp(self.norm2(x))))


class ParallelBlock(OrdinaryBlock):
    """Two attentions side by side, then two perceptrons: half the depth at the same size.

    x + attn(x) + attn1(x), then y + mlp(y) + mlp1(y), each branch with its own norm and LayerScale.

    Source: arXiv:2203.09795; the keys are the published ones (norm11, attn1, gamma_1_1, norm21,
    mlp1, gamma_2_1).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        second = OrdinaryBlock(*args, **kwargs)
        self.norm11, self.attn1, self.gamma_1_1 = second.norm1, second.attn, second.gamma_1
        self.norm21, self.mlp1, self.gamma_2_1 = second.norm2, second.mlp, second.gamma_2

    def forward(self, x: Tensor, **attn_options: Any) -> Tensor:  # (B, N, C)
        first = self._scale(self.gamma_1, self.attn(self.norm1(x), **attn_options))
        second = self._scale(self.gamma_1_1, self.attn1(self.norm11(x), **attn_options))
        x = x + self.drop_path1(first) + self.drop_path1(second)
        first = self._scale(self.gamma_2, self.mlp(self.norm2(x)))
        second = self._scale(self.gamma_2_1, self.mlp1(self.norm21(x)))
        return x + self.drop_path2(first) + self.drop_path2(second)


class OrdinaryMixerBlock(Scaled):
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
        mlp_layer: type[nn.Module] = Mlp,
        norm_layer: type[nn.Module] = OrdinaryAffine,
        act_layer: type[nn.Module] = nn.GELU,
        init_values: float = 1e-4,
        drop: float = 0.0,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = nn.Linear(seq_len, seq_len, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self._set_scales(("gamma_1", "gamma_2"), dim, init_values, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C)
        x = x + self.drop_path(self._scale(self.gamma_1, self.attn(self.norm1(x).mT).mT))
        return x + self.drop_path(self._scale(self.gamma_2, self.mlp(self.norm2(x))))


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution with channels last, (B, H, W, C_in) -> (B, H, W, C_out)."""

    def __init__(self, in_channels: int, out_channels: int, **dd: Any) -> None:
        super().__init__(in_channels, out_channels, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class OrdinaryConvBlock(Scaled):
    """timm's ConvNeXtBlock with channels last, (B, H, W, C), and the keys and arguments of
    `ConvBlock`; any C."""

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
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)
        self.norm = OrdinaryLayerNorm(dim, **dd)
        self.pwconv1 = PointwiseConv2d(dim, hidden, **dd)
        self.act = nn.GELU()
        self.pwconv2 = PointwiseConv2d(hidden, dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self._set_scales(("gamma",), dim, init_value if init_value > 0 else None, **dd)
        self.register_load_state_dict_pre_hook(_read_layer_scale)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        y = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        return x + self.drop_path(self._scale(self.gamma, y))


def _read_layer_scale(module: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    """Published files hold it for (B, C, H, W), as (1, C, 1, 1)."""
    key = f"{prefix}gamma"
    if key in state and state[key].ndim == 4:
        state[key] = state[key].flatten()
