"""Channel-wise scale and shift of packed features: Affine, LayerScale without the shift, and the
ordinary Affine for features that have been made invariant."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep
from deit.layers.linear import as_rep, invariant_bias

__all__ = ["Affine", "LayerScale", "OrdinaryAffine", "add_product"]


def add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a * b in one pass over memory."""
    if torch.compiler.is_compiling():
        return x + a * b  # compilers fuse it; torch 2.6 cannot export addcmul with free sizes
    return torch.addcmul(x, a, b)


class Affine(nn.Module):
    """y = alpha * x + beta, with beta on the invariant parts alone.

    Keys: `alpha_<irrep>` (multiplicity of the irrep,) for each irrep, and `beta`, or with `across`
    `beta_<irrep>` for each. All components of an irrep share one scale.

    Args:
        features: size of the last axis, or its representation.
        shift: whether there is a beta.
        across: representation along the axis before the last, if that is decomposed as well.
        init_value: initial alpha; beta starts at zero.
    """

    def __init__(
        self,
        features: int | Rep,
        shift: bool = True,
        *,
        group: Group = FLOP,
        across: Rep | None = None,
        init_value: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rep = as_rep(features, group)
        self.across = across
        self.shift = shift
        self.init_value = init_value
        dd = {"device": device, "dtype": dtype}
        for irrep in self.rep.group.irreps:
            width = self.rep.multiplicity(irrep)
            self.register_parameter(
                f"alpha_{irrep.name}", nn.Parameter(torch.full((width,), init_value, **dd))
            )
            if shift and across is not None:
                self.register_parameter(
                    f"beta_{irrep.name}", nn.Parameter(torch.zeros(width, **dd))
                )
        if shift and across is None:
            self.beta = nn.Parameter(torch.zeros(self.rep.invariant, **dd))

    def reset_parameters(self) -> None:
        """Back to the initial scale and no shift."""
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, self.init_value if name.startswith("alpha") else 0.0)

    def scale(self) -> Tensor:
        """All scales in packed order, (features,)."""
        return torch.cat(
            [
                getattr(self, f"alpha_{irrep.name}").repeat(irrep.dim)
                for irrep in self.rep.group.irreps
            ]
        )

    def offset(self) -> Tensor | None:
        """The shift in packed order, (features,) or with `across` (across.size, features)."""
        if not self.shift:
            return None
        if self.across is None:
            return F.pad(self.beta, (0, self.rep.size - self.rep.invariant))
        return torch.cat(
            [
                invariant_bias(getattr(self, f"beta_{irrep.name}"), i, self.rep, self.across)
                for i, irrep in enumerate(self.rep.group.irreps)
            ],
            -1,
        )

    def forward(self, x: Tensor) -> Tensor:  # (..., [across,] features), same shape
        offset = self.offset()
        if offset is None:
            return x * self.scale()
        return add_product(offset, x, self.scale())

    def extra_repr(self) -> str:
        return f"{self.rep.size}, shift={self.shift}, group={self.rep.group.name}"


class LayerScale(Affine):
    """gamma * x: an Affine without shift, initially small (arXiv:2103.17239)."""

    def __init__(self, features: int | Rep, init_value: float = 1e-4, **kwargs) -> None:
        super().__init__(features, shift=False, init_value=init_value, **kwargs)


class OrdinaryAffine(nn.Module):
    """y = alpha * x + beta over the last axis, for features that are not packed.

    Keys: `alpha`, `beta`, (features,), the published shapes; timm's Affine keeps (1, 1, features).
    """

    def __init__(
        self,
        features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(features, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Scale one, shift zero."""
        nn.init.ones_(self.alpha)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:  # (..., features), same shape
        return add_product(self.beta, x, self.alpha)
