"""Channel-wise scale and shift of features in parts: Affine, and LayerScale without the shift."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep
from deit.layers.linear import as_rep


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
        **dd: Any,
    ) -> None:
        super().__init__()
        self.rep = as_rep(features, group)
        self.across = across
        self.shift = shift
        self.init_value = init_value
        for irrep in self.rep.group.irreps:
            width = self.rep.multiplicity(irrep)
            alpha = nn.Parameter(torch.full((width,), init_value, **dd))
            self.register_parameter(f"alpha_{irrep.name}", alpha)
            if shift and across is not None:
                if irrep.dim > 1:
                    raise NotImplementedError("a shift on an irrep of more than one dimension")
                beta = nn.Parameter(torch.zeros(width, **dd))
                self.register_parameter(f"beta_{irrep.name}", beta)
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
