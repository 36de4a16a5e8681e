r"""Pointwise nonlinearities of features in parts.

A pointwise function commutes with permutations, so it is applied in the regular basis: for flopping
r+- = (s +- a)/sqrt 2, g+- = GELU(r+-), s' = (g+ + g-)/sqrt 2, a' = (g+ - g-)/sqrt 2
(arXiv:2502.05169, section 3).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep
from deit.layers.linear import as_rep


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation of GELU that ResMLP uses; any shape."""
    return x * torch.sigmoid(1.702 * x)


class GELU(nn.Module):
    """`act` in the regular basis: butterfly, act, butterfly.

    Args:
        features: size of all parts together, or their representation.
        act: a pointwise function; the exact (erf) GELU by default.
        scale: the features come and go multiplied by it: y = scale * act(x / scale).
    """

    def __init__(
        self,
        features: int | Rep,
        act: Callable[[Tensor], Tensor] = F.gelu,
        *,
        group: Group = FLOP,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.rep = as_rep(features, group)
        self.act = act
        self.scale = scale

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # same shapes
        group = self.rep.group
        pieces: list[Tensor] = []
        for part, irrep in zip(x, group.irreps, strict=True):
            pieces.extend(part.chunk(irrep.dim**2, -1) if irrep.dim > 1 else [part])
        copies = [self.act(copy) for copy in group.mix(pieces, inverse=True, gain=1 / self.scale)]
        pieces = group.mix(copies, inverse=False, gain=self.scale)
        outputs = []
        for irrep in group.irreps:
            own, pieces = pieces[: irrep.dim**2], pieces[irrep.dim**2 :]
            outputs.append(own[0] if len(own) == 1 else torch.cat(own, -1))
        return tuple(outputs)

    def extra_repr(self) -> str:
        return f"{self.rep.size}, act={getattr(self.act, '__name__', self.act)}"
