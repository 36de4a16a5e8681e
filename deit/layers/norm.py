r"""LayerNorm of features in parts (arXiv:2502.05169, section 3).

Each irrep component is centred over its own channels, then all are divided by one standard
deviation, which the group leaves alone; for flopping sigma^2 = (var s + var a + eps) / 2. The scale
acts on every irrep, the shift on the trivial one.
"""

from typing import Any

import torch
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep
from deit.layers import tracing
from deit.layers.affine import Affine
from deit.layers.linear import as_rep


class LayerNorm(nn.Module):
    """Equivariant LayerNorm over the channels; keys `scaling.alpha_<irrep>`, `scaling.beta`.

    Args:
        features: size of all parts together, or their representation, made of whole regular copies.
        eps: added to the summed variances of the irrep components.
    """

    def __init__(
        self,
        features: int | Rep,
        eps: float = 1e-6,
        *,
        group: Group = FLOP,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.rep = as_rep(features, group)
        if self.rep.fixed:
            raise ValueError("LayerNorm is defined on whole copies of the regular representation")
        self.eps = eps
        self.scaling = Affine(self.rep, **dd)

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # same shapes and dtypes
        group = self.rep.group
        centred: list[Tensor] = []
        variances: list[Tensor] = []
        for part, irrep in zip(x, group.irreps, strict=True):
            # as torch's own layer norm, half precision is for storage: the moments need float32
            part = tracing.widen(part)
            if irrep.dim > 1:  # each component by itself
                part = part.unflatten(-1, (irrep.dim, -1))
            part = part - part.mean(-1, keepdim=True)
            part = part.flatten(-2) if irrep.dim > 1 else part
            centred.append(part)
            mean = part.square().mean(-1, keepdim=True)
            variances.append(mean if irrep.dim == 1 else mean * irrep.dim**2)
        rstd = torch.rsqrt((sum(variances[1:], variances[0]) + self.eps) / group.order)
        scaled = self.scaling(tuple(part * rstd for part in centred))
        return tuple(y.to(part.dtype) for y, part in zip(scaled, x, strict=True))

    def extra_repr(self) -> str:
        return f"{self.rep.size}, eps={self.eps}, group={self.rep.group.name}"
