r"""LayerNorm of packed features (arXiv:2502.05169, section 3).

Each irrep component is centred over its own channels, then all are divided by one standard
deviation, which the group leaves alone; for flopping sigma^2 = (var s + var a + eps) / 2. The scale
acts on every irrep, the shift on the trivial one.
"""

from __future__ import annotations

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep
from deit.layers.affine import Affine
from deit.layers.linear import as_rep

__all__ = ["LayerNorm"]


@register_notrace_module  # its dtype branch is decided for each call, not by a symbolic tracer
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

    def normalize(self, x: Tensor) -> Tensor:
        """Centre and divide by sigma, without scale and shift; same shape."""
        group = self.rep.group
        if self.rep.is_uniform:
            parts = x.unflatten(-1, (group.order, -1))
            parts = parts - parts.mean(-1, keepdim=True)
            # the mean over all channels is (var s + var a) / 2
            variance = parts.square().mean((-2, -1), keepdim=True)
            return (parts * torch.rsqrt(variance + self.eps / group.order)).flatten(-2)
        blocks = [
            block.unflatten(-1, (irrep.dim, -1))
            for block, irrep in zip(self.rep.split(x), group.irreps, strict=True)
        ]
        blocks = [block - block.mean(-1, keepdim=True) for block in blocks]
        x = torch.cat([block.flatten(-2) for block in blocks], -1)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps / group.order)

    def forward(self, x: Tensor) -> Tensor:  # (..., features), same shape and dtype
        # as torch's own layer norm, half precision is for storage: the moments need float32
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return self.scaling(self.normalize(wide)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.rep.size}, eps={self.eps}, group={self.rep.group.name}"
