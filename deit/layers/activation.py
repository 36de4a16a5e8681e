r"""Pointwise nonlinearities of packed features.

A pointwise function commutes with permutations, so it is applied in the regular basis: for flopping
r+- = (s +- a)/sqrt 2, g+- = GELU(r+-), s' = (g+ + g-)/sqrt 2, a' = (g+ - g-)/sqrt 2
(arXiv:2502.05169, section 3). When the tokens are decomposed too, both axes are transformed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep
from deit.layers.linear import as_rep

__all__ = ["GELU", "quick_gelu"]


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation of GELU that ResMLP uses; any shape."""
    return x * torch.sigmoid(1.702 * x)


_KERNELS = {F.gelu: "gelu", quick_gelu: "quick_gelu"}


class GELU(nn.Module):
    """`act` in the regular basis of the last axis, and of the one before it if `across` is given.

    Args:
        features: size of the last axis, or its representation.
        act: a pointwise function; the exact (erf) GELU by default.
        across: representation along the axis before the last, if that is decomposed as well.
    """

    def __init__(
        self,
        features: int | Rep,
        act: Callable[[Tensor], Tensor] = F.gelu,
        *,
        group: Group = FLOP,
        across: Rep | None = None,
    ) -> None:
        super().__init__()
        self.rep = as_rep(features, group)
        self.act = act
        self.across = across

    @property
    def kernel(self) -> str | None:
        """The name by which `deit.kernels` knows the pointwise function; None if it does not."""
        return _KERNELS.get(self.act)

    @property
    def gain(self) -> float:
        """The factor that `map` leaves to the linear layers before and after it.

        Each butterfly of two elements has a factor root one half, which a matrix product applies
        at no cost. Tokens of a middle column take no part in one, so then theirs stays here.
        """
        gain = sqrt(0.5) if self.rep.group.order == 2 else 1.0
        return gain * sqrt(0.5) if self._leaves_token_factor else gain

    @property
    def _leaves_token_factor(self) -> bool:
        return self.across is not None and self.across.group.order == 2 and not self.across.fixed

    def map(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The nonlinearity irrep by irrep, for input that was multiplied by `gain`, and giving
        output that must be multiplied by it."""
        group = self.rep.group
        # without the factor that others apply
        gain = sqrt(2) if group.order == 2 else 1.0
        pieces = []
        for part, irrep in zip(parts, group.irreps, strict=True):
            chunks = part.unflatten(-1, (irrep.dim**2, -1)) if irrep.dim > 1 else part[..., None, :]
            pieces.extend(chunks[..., i, :] for i in range(irrep.dim**2))
        copies = [self._act(copy) for copy in group.mix(pieces, inverse=True, gain=gain)]
        pieces = group.mix(copies, inverse=False, gain=gain)
        outputs = []
        for irrep in group.irreps:
            own, pieces = pieces[: irrep.dim**2], pieces[irrep.dim**2 :]
            outputs.append(own[0] if len(own) == 1 else torch.cat(own, -1))
        return outputs

    def _act(self, x: Tensor) -> Tensor:
        if self.across is None:
            return self.act(x)
        gain = sqrt(2) if self._leaves_token_factor else 1.0
        x = self.act(self.across.to_regular(x, -2, gain))
        return self.across.from_regular(x, -2, gain)

    def forward(self, x: Tensor) -> Tensor:  # (..., [across,] features), same shape
        parts = [part * self.gain for part in self.rep.split(x)]
        return torch.cat(self.map(parts), -1) * self.gain

    def extra_repr(self) -> str:
        return f"{self.rep.size}, act={getattr(self.act, '__name__', self.act)}"
