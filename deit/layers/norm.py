r"""LayerNorm of packed features (arXiv:2502.05169, section 3).

Each irrep component is centred over its own channels, then all are divided by one standard
deviation, which the group leaves alone; for flopping sigma^2 = (var s + var a + eps) / 2. The scale
acts on every irrep, the shift on the trivial one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep
from deit.kernels.choice import is_being_compiled
from deit.layers import fused, tracing
from deit.layers.affine import Affine
from deit.layers.linear import as_rep

__all__ = ["LayerNorm"]


class LayerNorm(nn.Module):
    """Equivariant LayerNorm over the last axis; keys `scaling.alpha_<irrep>`, `scaling.beta`.

    Args:
        features: size of the last axis, or its representation, made of whole regular copies.
        eps: added to the summed variances of the irrep components.
    """

    def __init__(
        self,
        features: int | Rep,
        eps: float = 1e-6,
        *,
        group: Group = FLOP,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rep = as_rep(features, group)
        if self.rep.fixed:
            raise ValueError("LayerNorm is defined on whole copies of the regular representation")
        self.eps = eps
        self.scaling = Affine(self.rep, device=device, dtype=dtype)

    def centre(self, x: Tensor) -> Tensor:
        """Subtract from each irrep component its mean over channels; same shape."""
        group = self.rep.group
        if self.rep.is_uniform:
            parts = x.unflatten(-1, (group.order, -1))
            return (parts - parts.mean(-1, keepdim=True)).flatten(-2)
        blocks = []
        for block, irrep in zip(self.rep.split(x), group.irreps, strict=True):
            block = block.unflatten(-1, (irrep.dim, -1))
            blocks.append((block - block.mean(-1, keepdim=True)).flatten(-2))
        return torch.cat(blocks, -1)

    def forward(self, x: Tensor) -> Tensor:  # (..., features), same shape and dtype
        y = fused.layer_norm(x, self)
        if y is not None:
            return y
        # as torch's own layer norm, half precision is for storage: the moments need float32
        wide = tracing.widen(x)
        scale, offset = self.scaling.scale().to(wide.dtype), self.scaling.offset().to(wide.dtype)
        if is_being_compiled() and self.rep.is_uniform:
            return self._by_irrep(wide, scale, offset).to(x.dtype)
        # Centred parts have mean zero together, and their common variance is the mean of the
        # parts' own: the ordinary layer norm does the rest in one pass.
        order = self.rep.group.order
        y = F.layer_norm(self.centre(wide), (self.rep.size,), scale, offset, self.eps / order)
        return y.to(x.dtype)

    def _by_irrep(self, x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """The formula with every reduction and product over one irrep's channels: loops of one
        shape, which a compiler fuses into one."""
        parts = [part - part.mean(-1, keepdim=True) for part in self.rep.split(x)]
        variances = [part.square().mean(-1, keepdim=True) for part in parts]
        rstd = torch.rsqrt((sum(variances) + self.eps) / len(parts))
        vectors = zip(self.rep.split(scale), self.rep.split(offset), strict=True)
        return torch.cat(
            [part * rstd * w + b for part, (w, b) in zip(parts, vectors, strict=True)], -1
        )

    def extra_repr(self) -> str:
        return f"{self.rep.size}, eps={self.eps}, group={self.rep.group.name}"
