"""Channel-wise scale and shift: Affine, LayerScale without the shift, and the ordinary Affine for
features that have been made invariant."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep
from deit.layers.linear import as_rep

__all__ = ["Affine", "LayerScale", "OrdinaryAffine"]


class Affine(nn.Module):
    """y = alpha * x + beta on features in parts, with beta where the group changes nothing.

    Keys: `alpha_<irrep>` (multiplicity of the irrep,) for each irrep; and `beta` for the trivial
    part, or with `across` `beta_<irrep>` for each. All components of an irrep share one scale.

    Args:
        features: size of all parts together, or their representation.
        shift: whether there is a beta.
        across: representation along the axis before the last, if that is decomposed as well. Part
            rho is then invariant in the rows that carry rho too, and is shifted there.
        init_value: initial alpha; beta starts at zero.

    Raises:
        NotImplementedError: for a shift `across` an irrep of more than one dimension.
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
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        for irrep in self.rep.group.irreps:
            width = self.rep.multiplicity(irrep)
            self.register_parameter(
                f"alpha_{irrep.name}", nn.Parameter(torch.full((width,), init_value, **dd))
            )
            if shift and across is not None:
                if irrep.dim > 1:
                    raise NotImplementedError("a shift on an irrep of more than one dimension")
                self.register_parameter(
                    f"beta_{irrep.name}", nn.Parameter(torch.zeros(width, **dd))
                )
        if shift and across is None:
            self.beta = nn.Parameter(torch.zeros(self.rep.invariant, **dd))

    def reset_parameters(self) -> None:
        """Back to the initial scale and no shift."""
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, self.init_value if name.startswith("alpha") else 0.0)

    def offset(self, index: int) -> Tensor | None:
        """The shift of part number `index`, (width,) or `across` rows of it; None for no shift."""
        irrep = self.rep.group.irreps[index]
        if not self.shift:
            return None
        if self.across is None:
            return self.beta if irrep.is_trivial else None
        beta = getattr(self, f"beta_{irrep.name}")
        before, rows = sum(self.across.sizes[:index]), self.across.sizes[index]
        return F.pad(beta.expand(rows, -1), (0, 0, before, self.across.size - before - rows))

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # same shapes
        outputs = []
        for index, (part, irrep) in enumerate(zip(x, self.rep.group.irreps, strict=True)):
            alpha = getattr(self, f"alpha_{irrep.name}")
            alpha = alpha.repeat(irrep.dim) if irrep.dim > 1 else alpha
            beta = self.offset(index)
            outputs.append(part * alpha if beta is None else part * alpha + beta)
        return tuple(outputs)

    def extra_repr(self) -> str:
        return f"{self.rep.size}, shift={self.shift}, group={self.rep.group.name}"


class LayerScale(Affine):
    """gamma * x: an Affine without shift, initially small (arXiv:2103.17239)."""

    def __init__(self, features: int | Rep, init_value: float = 1e-4, **kwargs: Any) -> None:
        super().__init__(features, shift=False, init_value=init_value, **kwargs)


class OrdinaryAffine(nn.Module):
    """y = alpha * x + beta over the last axis, for invariant or ordinary features.

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
        return x * self.alpha + self.beta
