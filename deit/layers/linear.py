r"""Equivariant linear maps: one dense block for each irrep (arXiv:2502.05169, section 3).

By Schur's lemma a linear map that commutes with the group mixes no irreps: for flopping
y_s = W_sym x_s + b and y_a = W_asym x_a, half the multiply-adds of a dense map.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from deit.groups import FLOP, Group, Rep


def as_rep(features: int | Rep, group: Group = FLOP) -> Rep:
    """`features` channels in regular copies of `group`, or the representation itself."""
    return features if isinstance(features, Rep) else group.regular(features)


class Linear(nn.Module):
    """y_rho = W_rho x_rho (+ b) for each irrep rho, on features in parts.

    Each block is a `torch.nn.Linear`, the submodule `<prefix>_<irrep>`.

    Args:
        in_features: size of all parts of the input together, or its representation.
        out_features: likewise of the output.
        bias: a shift of the trivial part. No other part can have one: the group changes it.
        group: the group of plain sizes.
        invariant: the feature is held in a basis in which the group moves places and leaves every
            part alone (see `MixerBlock`). Then each part has a shift.
        unshifted: (start, count) of rows, along the axis before the last, that the group leaves in
            place. There the parts but the first have no shift.
        prefix: of the blocks' names.
        pointwise: show the weights in state dicts as (out, in, 1, 1), the shape of the 1x1
            convolutions of published ConvNeXts. Both shapes load.

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
        invariant: bool = False,
        unshifted: tuple[int, int] | None = None,
        prefix: str = "linear",
        pointwise: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.in_rep, self.out_rep = as_rep(in_features, group), as_rep(out_features, group)
        self.group = self.in_rep.group
        if self.out_rep.group is not self.group:
            raise ValueError(
                f"input and output transform under different groups: {self.group.name} and "
                f"{self.out_rep.group.name}"
            )
        self.prefix = prefix
        self.unshifted = unshifted
        for irrep in self.group.irreps:
            sizes = (self.in_rep.multiplicity(irrep), self.out_rep.multiplicity(irrep))
            shift = bias and (invariant or irrep.is_trivial)
            block = nn.Linear(*sizes, bias=shift, **dd)
            if pointwise:
                block.register_state_dict_post_hook(_show_as_convolution)
                block.register_load_state_dict_pre_hook(_read_convolution)
            self.add_module(f"{prefix}_{irrep.name}", block)

    def blocks(self) -> list[nn.Module]:
        """The irreps' blocks, in order."""
        return [getattr(self, f"{self.prefix}_{irrep.name}") for irrep in self.group.irreps]

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Parts (..., in) to parts (..., out)."""
        outputs = []
        for block, part, irrep in zip(self.blocks(), x, self.group.irreps, strict=True):
            if irrep.dim > 1:
                # the same block on each of the irrep's components
                outputs.append(block(part.unflatten(-1, (irrep.dim, -1))).flatten(-2))
            elif self.unshifted is None or irrep.is_trivial:
                outputs.append(block(part))
            else:
                outputs.append(_shift_other_rows(block, part, *self.unshifted))
        return tuple(outputs)

    def extra_repr(self) -> str:
        return f"{self.in_rep.size}, {self.out_rep.size}, group={self.group.name}"


def _shift_other_rows(block: nn.Module, part: Tensor, start: int, count: int) -> Tensor:
    """The block, without its shift on `count` rows from `start`; (..., N, in) to (..., N, out)."""
    # The shift is what comes out for zeros: the block may be an adapter or quantised, and has to
    # be called once, as hooks expect.
    y = block(torch.cat([part, torch.zeros_like(part.narrow(-2, 0, 1))], -2))
    end = part.shape[-2]
    rows = y.narrow(-2, start, count) - y.narrow(-2, end, 1)
    after = start + count
    return torch.cat([y.narrow(-2, 0, start), rows, y.narrow(-2, after, end - after)], -2)


def _show_as_convolution(block: nn.Linear, state: dict, prefix: str, metadata: Any) -> None:
    weight = state.get(f"{prefix}weight")
    # with keep_vars=True callers, such as torch.jit.trace, look for the parameters themselves
    if weight is not None and not isinstance(weight, nn.Parameter):
        # quantised tensors know no such indexing, and keep their shape
        with suppress(NotImplementedError):
            state[f"{prefix}weight"] = weight[..., None, None]


def _read_convolution(block: nn.Linear, state: dict, prefix: str, *_: Any) -> None:
    weight = state.get(f"{prefix}weight")
    if weight is not None and weight.ndim == 4:
        state[f"{prefix}weight"] = weight.flatten(1)
