r"""Equivariant linear maps: one dense block for each irrep (arXiv:2502.05169, section 3).

By Schur's lemma the matrix of a linear map that commutes with the group is block-diagonal in the
packed basis: for flopping y_s = W_sym x_s + b and y_a = W_asym x_a, half the multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep
from deit.layers import fused

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

    def shift(self) -> Tensor | None:
        """What is added to a feature that is decomposed `across` too, (across.size, out)."""
        if self.across is None or self.blocks()[0].bias is None:
            return None
        return torch.cat(
            [
                invariant_bias(block.bias, index, self.out_rep, self.across)
                for index, block in enumerate(self.blocks())
            ],
            -1,
        )

    def map(
        self, parts: Sequence[Tensor], *, in_gain: float = 1.0, out_gain: float = 1.0
    ) -> list[Tensor]:
        """The map on a feature given irrep by irrep, with factors on its input and its output.

        Layers that work irrep by irrep pass their parts on as they are, without packing them, and
        leave constant factors to the matrix products, where they cost nothing.
        """
        return [
            self._map_block(index, block, part, in_gain, out_gain)
            for index, (block, part) in enumerate(zip(self.blocks(), parts, strict=True))
        ]

    def _map_block(
        self, index: int, block: nn.Module, x: Tensor, in_gain: float, out_gain: float
    ) -> Tensor:
        if not self.in_rep.sizes[index] and not self.out_rep.sizes[index]:
            return x  # the irrep does not occur: one column of tokens has no antisymmetric part
        weight, bias = block.weight.flatten(1), block.bias
        d = self.group.irreps[index].dim
        if d > 1:  # the same weight acts on each component of the irrep
            x = x.unflatten(-1, (d, -1))
        # Two-dimensional operands and one addmm: the parts of a packed feature are rows with a
        # stride, which matrix products take as they are.
        rows = x.reshape(-1, x.shape[-1])
        if bias is None or self.across is not None:
            zero = weight.new_zeros(1)
            y = torch.addmm(zero, rows, weight.t(), beta=0, alpha=in_gain * out_gain)
        else:
            y = torch.addmm(bias, rows, weight.t(), beta=out_gain, alpha=in_gain * out_gain)
        y = y.reshape(x.shape[:-1] + y.shape[-1:])  # unpacking would stop symbolic tracers
        if d > 1:
            y = y.flatten(-2)
        if bias is not None and self.across is not None:
            y = y + invariant_bias(bias.to(y.dtype) * out_gain, index, self.out_rep, self.across)
        return y

    def forward(self, x: Tensor) -> Tensor:  # (..., [across,] in) -> (..., [across,] out)
        y = fused.linear(x, self)
        if y is not None:
            return y
        return torch.cat(self.map(self.in_rep.split(x)), -1)

    def extra_repr(self) -> str:
        return f"{self.in_rep.size}, {self.out_rep.size}, group={self.group.name}"
