"""The block of perceptrons over tokens and over channels, on features in parts.

In ResMLP tokens are decomposed as channels are: a part (B, N, C/2) holds its symmetric tokens
first, then its antisymmetric ones. With channel irrep first the four kinds of entries are ss and sa
in s, as and aa in a. Flopping negates sa and as, so shifts are possible on ss and aa alone.

Shifts of linear maps get there by a change of basis. A map over channels does not care for the
basis of the tokens, so it works on l = ss + sa and r = ss - sa for s, and on l = aa + as and
r = aa - as for a. There flopping exchanges l and r of either part, and a shift is the same on all
rows. Likewise a map over tokens works on sums and differences of channels.

On a grid of odd width the tokens of the middle column have no antisymmetric partner. They are the
rows m between l and r, times root two as l and r are. Flopping leaves them in place and negates
those of a, which therefore have no shift.

Source: arXiv:2502.05169, section 4; ResMLP, arXiv:2105.03404.
"""

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from deit.groups import Rep
from deit.layers.activation import quick_gelu
from deit.layers.affine import Affine, LayerScale
from deit.layers.block import add
from deit.layers.drop import DropPath
from deit.layers.linear import Linear
from deit.layers.mlp import Mlp


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
        **dd: Any,
    ) -> None:
        super().__init__()
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
            unshifted=(tokens.free, tokens.fixed) if tokens.fixed else None,
            prefix="lin",
            **dd,
        )
        self.gamma_2 = LayerScale(channels, init_values, **dd)
        self.drop_path1 = DropPath(drop_path)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = add(x, self.drop_path1(self.gamma_1(self.mix(self.norm1(x)))))
        y = self.from_places(self.mlp(self.to_places(self.norm2(x))))
        return add(x, self.drop_path2(self.gamma_2(y)))

    def mix(self, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """`attn` over the tokens, on sums and differences of the channels."""
        (ss, sa), (as_, aa) = (self.tokens.split(part, 1) for part in x)
        symmetric = torch.cat([ss + as_, ss - as_], -1)
        antisymmetric = torch.cat([aa + sa, aa - sa], -1)
        symmetric, antisymmetric = self.attn((symmetric.mT, antisymmetric.mT))
        ss, as_ = _means(symmetric.mT.chunk(2, -1))
        aa, sa = _means(antisymmetric.mT.chunk(2, -1))
        return torch.cat([ss, sa], 1), torch.cat([as_, aa], 1)

    def to_places(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[l | m | r] of both parts along the tokens, same shapes; m is empty for even widths."""
        (ss, s_middle, sa), (as_, a_middle, aa) = (self._pieces(part, sqrt(2)) for part in x)
        return (
            torch.cat([ss + sa, *s_middle, ss - sa], 1),
            torch.cat([aa + as_, *a_middle, aa - as_], 1),
        )

    def from_places(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The inverse of `to_places`."""
        (s_left, s_middle, s_right), (a_left, a_middle, a_right) = (
            self._pieces(part, sqrt(0.5)) for part in x
        )
        ss, sa = _means((s_left, s_right))
        aa, as_ = _means((a_left, a_right))
        return torch.cat([ss, *s_middle, sa], 1), torch.cat([as_, *a_middle, aa], 1)

    def _pieces(self, part: Tensor, gain: float) -> tuple[Tensor, list[Tensor], Tensor]:
        """The first and the last rows, and between them those of a middle column times `gain`."""
        free, fixed = self.tokens.free, self.tokens.fixed
        # indexing and not unpacking: symbolic tracers cannot iterate over the result of split
        pieces = part.split([free, fixed, free] if fixed else [free, free], 1)
        return pieces[0], [gain * pieces[1]] if fixed else [], pieces[2 if fixed else 1]


def _means(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Half the sum and half the difference of two tensors."""
    first, second = pair
    return (first + second) * 0.5, (first - second) * 0.5
