r"""Equivariant linear maps: one dense block for each irrep (arXiv:2502.05169, section 3).

By Schur's lemma the matrix of a linear map that commutes with the group is block-diagonal in the
packed basis: for flopping y_s = W_sym x_s + b and y_a = W_asym x_a, half the multiply-adds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep

__all__ = ["Linear", "as_rep", "invariant_bias"]


def as_rep(features: int | Rep, group: Group = FLOP) -> Rep:
    """`features` channels in regular copies of `group`, or the representation itself."""
    return features if isinstance(features, Rep) else group.regular(features)


def invariant_bias(vector: Tensor, index: int, rep: Rep, across: Rep) -> Tensor:
    """Place a shift of irrep number `index` where the shifted feature is invariant.

    A feature whose two axes are both decomposed is invariant where both carry the same
    one-dimensional irrep. Returns (across.size, rep.sizes[index]): `vector` in the rows of
    `across` that carry the irrep, zero in the others.
    """
    if rep.group.irreps[index].dim != 1:
        raise NotImplementedError("a shift on an irrep of more than one dimension")
    before, rows = sum(across.sizes[:index]), across.sizes[index]
    return F.pad(vector.expand(rows, -1), (0, 0, before, across.size - before - rows))


class Linear(nn.Module):
    """y = x W^T + b on packed features, block-diagonal over the irreps.

    Args:
        in_features: size of the last axis of the input, or its representation.
        out_features: likewise of the output.
        bias: the shift, which is possible on invariant parts only. Without `across` that is the
            trivial irrep. With `across` there is one shift an irrep, see `invariant_bias`.
        group: the group of plain sizes.
        across: representation along the axis before the last, if that is decomposed as well.
        prefix: blocks are the submodules `<prefix>_<irrep>`, with the usual weight and bias.
        pointwise: keep the weights as (out, in, 1, 1), the shape of a 1x1 convolution.

    Raises:
        ValueError: if a size is no multiple of the group's order or the groups differ.
    """

    def __init__(
        self,
        in_features: int | Rep,
        out_features: int | Rep,
        bias: bool = True,
        *,
        group: Group = FLOP,
        across: Rep | None = None,
        prefix: str = "linear",
        pointwise: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_rep, self.out_rep = as_rep(in_features, group), as_rep(out_features, group)
        self.group = self.in_rep.group
        if self.out_rep.group is not self.group:
            raise ValueError(
                f"input and output transform under different groups: {self.group.name} and "
                f"{self.out_rep.group.name}"
            )
        self.across = across
        self.prefix = prefix
        for irrep in self.group.irreps:
            args = (self.in_rep.multiplicity(irrep), self.out_rep.multiplicity(irrep))
            kwargs = dict(
                bias=bias and (irrep.is_trivial or across is not None), device=device, dtype=dtype
            )
            block = nn.Conv2d(*args, 1, **kwargs) if pointwise else nn.Linear(*args, **kwargs)
            self.add_module(f"{prefix}_{irrep.name}", block)

    def blocks(self) -> list[nn.Module]:
        """The irreps' blocks, in order."""
        return [getattr(self, f"{self.prefix}_{irrep.name}") for irrep in self.group.irreps]

    def forward(self, x: Tensor) -> Tensor:  # (..., [across,] in) -> (..., [across,] out)
        outputs = []
        for index, (block, part) in enumerate(
            zip(self.blocks(), self.in_rep.split(x), strict=True)
        ):
            d = self.group.irreps[index].dim
            weight = block.weight.flatten(1)
            if d > 1:  # the same weight acts on each component of the irrep
                y = F.linear(part.unflatten(-1, (d, -1)), weight).flatten(-2)
            elif self.across is None or block.bias is None:
                y = F.linear(part, weight, block.bias)
            else:
                y = F.linear(part, weight)
                y = y + invariant_bias(block.bias.to(y.dtype), index, self.out_rep, self.across)
            outputs.append(y)
        return torch.cat(outputs, -1)

    def extra_repr(self) -> str:
        return f"{self.in_rep.size}, {self.out_rep.size}, group={self.group.name}"
