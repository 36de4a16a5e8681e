"""From features in parts to ordinary ones (arXiv:2502.05169, section 4: hybrids)."""

import torch
from torch import Tensor, nn

from deit.groups import FLOP, Group


class RegularBridge(nn.Module):
    """[(s + a)/sqrt 2, (s - a)/sqrt 2]: all information is kept, invariance is given up.

    Parts (..., dim / 2) to one tensor (..., dim); so does `InvariantBridge`.
    """

    def __init__(self, dim: int, group: Group = FLOP) -> None:
        super().__init__()
        self.rep = group.regular(dim)

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return self.rep.to_regular(torch.cat(x, -1))


class InvariantBridge(nn.Module):
    """[s, |a|]: what follows sees features that the group leaves alone.

    Needs irreps of dimension one, on which the group acts by signs.
    """

    def __init__(self, dim: int, group: Group = FLOP) -> None:
        super().__init__()
        self.rep = group.regular(dim)
        if any(irrep.dim > 1 for irrep in group.irreps):
            raise NotImplementedError("the invariants of an irrep of more than one dimension")

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        trivial, *others = x
        return torch.cat([trivial, *(part.abs() for part in others)], -1)
