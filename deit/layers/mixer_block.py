"""Blocks of multi-layer perceptrons over tokens and channels: the equivariant and the ordinary one.

In ResMLP tokens are decomposed as channels are: a part (B, N, C/2) holds its symmetric tokens
first, then its antisymmetric ones. With channel irrep first the four kinds of entries are ss and sa
in s, as and aa in a. Flopping negates sa and as, so shifts are possible on ss and aa alone.

Shifts of linear maps get there by a change of basis. A map over channels does not care for the
basis of the tokens, so it works on l = ss + sa and r = ss - sa for s, and on l = aa + as and
r = aa - as for a. There flopping exchanges l and r of either part, and a shift is the same on all
rows. Likewise a map over tokens works on sums and differences of channels.

Source: arXiv:2502.05169, section 4; ResMLP, arXiv:2105.03404.
"""

from __future__ import annotations

from math import sqrt

import torch
from timm.layers import DropPath as TensorDropPath
from timm.layers import Mlp as OrdinaryMlp
from torch import Tensor, nn

from deit.groups import Rep
from deit.layers.activation import quick_gelu
from deit.layers.affine import Affine, LayerScale, OrdinaryAffine
from deit.layers.block import add
from deit.layers.drop import DropPath
from deit.layers.linear import Linear
from deit.layers.mlp import Mlp

__all__ = ["MixerBlock", "OrdinaryMixerBlock"]


class MixerBlock(nn.Module):
    """x + gamma_1(mix(norm1 x)), then x + gamma_2(mlp(norm2 x)), on parts (B, N, C/2).

    `mix` is a Linear over the tokens (key `attn`), `mlp` is over the channels; each leaves the
    other axis alone, and both have shifts on the entries that the group leaves alone.

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
        self.tokens = tokens
        self.norm1 = Affine(channels, across=tokens, **dd)
        self.attn = Linear(tokens, tokens, invariant=True, prefix="lin", **dd)
        self.gamma_1 = LayerScale(channels, init_values, **dd)
        self.norm2 = Affine(channels, across=tokens, **dd)
        self.mlp = Mlp(
            channels,
            int(channels.size * mlp_ratio),
            act=quick_gelu,
            scale=sqrt(2),  # l and r are root two times the values at the places
            drop=drop,
            invariant=True,
            prefix="lin",
            **dd,
        )
        self.gamma_2 = LayerScale(channels, init_values, **dd)
        self.drop_path1 = DropPath(drop_path)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = add(x, self.drop_path1(self.gamma_1(self.mix(self.norm1(x)))))
        y = self.from_places(self.mlp(self.to_places(self.norm2(x))))
        return add(x, self.drop_path2(self.gamma_2(y)))

    def mix(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """`attn` over the tokens, on sums and differences of the channels."""
        (ss, sa), (as_, aa) = self._rows(x[0]), self._rows(x[1])
        symmetric = torch.cat([ss + as_, ss - as_], -1)
        antisymmetric = torch.cat([aa + sa, aa - sa], -1)
        symmetric, antisymmetric = self.attn((symmetric.mT, antisymmetric.mT))
        ss, as_ = _means(symmetric.mT, -1)
        aa, sa = _means(antisymmetric.mT, -1)
        return torch.cat([ss, sa], 1), torch.cat([as_, aa], 1)

    def to_places(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[l | r] of both parts along the tokens; a middle column is in l and in r."""
        (ss, sa), (as_, aa) = (self._with_middle(*self._rows(part)) for part in x)
        return torch.cat([ss + sa, ss - sa], 1), torch.cat([aa + as_, aa - as_], 1)

    def from_places(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The inverse of `to_places`."""
        ss, sa = _means(x[0], 1)
        aa, as_ = _means(x[1], 1)
        return self._without_middle(ss, sa), self._without_middle(as_, aa)

    def _rows(self, part: Tensor) -> list[Tensor]:
        """Symmetric and antisymmetric tokens."""
        return self.tokens.split(part, 1)

    def _with_middle(self, symmetric: Tensor, antisymmetric: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of a middle column have no antisymmetric partner: it is zero."""
        fixed = self.tokens.fixed
        if not fixed:
            return symmetric, antisymmetric
        middle = symmetric[:, -fixed:]
        symmetric = torch.cat([symmetric[:, :-fixed], sqrt(2) * middle], 1)
        return symmetric, torch.cat([antisymmetric, torch.zeros_like(middle)], 1)

    def _without_middle(self, symmetric: Tensor, antisymmetric: Tensor) -> Tensor:
        fixed = self.tokens.fixed
        if fixed:
            middle = sqrt(0.5) * symmetric[:, -fixed:]
            symmetric = torch.cat([symmetric[:, :-fixed], middle], 1)
            antisymmetric = antisymmetric[:, :-fixed]
        return torch.cat([symmetric, antisymmetric], 1)


def _means(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Half the sum, and half the difference, of the two halves along `dim`."""
    first, second = x.chunk(2, dim)
    return (first + second) * 0.5, (first - second) * 0.5


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
        self.drop_path = TensorDropPath(drop_path) if drop_path > 0 else nn.Identity()

    def reset_parameters(self) -> None:
        """LayerScale's initial value; the submodules reset themselves."""
        nn.init.constant_(self.gamma_1, self.init_values)
        nn.init.constant_(self.gamma_2, self.init_values)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C)
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x).mT).mT)
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))
