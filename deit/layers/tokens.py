"""Token grids under flopping: the order of the tokens, position embeddings and prefix tokens.

Tokens are kept in *mirror order*: row-major the left half of the grid, then its middle column if
the width is odd, then the right half mirrored. Flopping then swaps the first and the last block and
leaves the middle alone; without a middle, tokens i and i + N/2 are mirror images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from deit.groups import FLOP, Rep
from deit.layers.fixed import FixedBuffers


@dataclass(frozen=True)
class MirrorGrid:
    """A grid of `height` x `width` tokens."""

    height: int
    width: int

    @property
    def rep(self) -> Rep:
        """How flopping acts on the token axis in mirror order."""
        return Rep(FLOP, free=self.height * (self.width // 2), fixed=self.height * (self.width % 2))

    @property
    def blocks(self) -> list[int]:
        """Numbers of tokens on the left, in the middle and on the right."""
        return [self.rep.free, self.rep.fixed, self.rep.free]

    def permutation(self) -> Tensor:
        """Row-major patch of each token in mirror order, int64 (N,), on the CPU."""
        patches = torch.arange(self.height * self.width, device="cpu")
        return self.to_mirror_order(patches.view(1, self.height, self.width, 1)).flatten()

    @classmethod
    def from_permutation(cls, permutation: Tensor) -> MirrorGrid:
        """The grid whose `permutation` this is; raises ValueError if there is none."""
        count = len(permutation)
        for width in (w for w in range(1, count + 1) if count % w == 0):
            grid = cls(count // width, width)
            if torch.equal(grid.permutation(), permutation.cpu()):
                return grid
        raise ValueError("the token order in the checkpoint is not that of any grid")

    def to_mirror_order(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, N, C)."""
        half, odd = self.width // 2, self.width % 2
        left, middle, right = x.split([half, odd, half], 2)
        parts = [left, middle, right.flip(2)] if odd else [left, right.flip(2)]
        return torch.cat([part.flatten(1, 2) for part in parts], 1)

    def to_image_order(self, x: Tensor) -> Tensor:
        """(B, N, C) in mirror order to (B, H, W, C)."""
        left, middle, right = x.split(self.blocks, 1)
        parts = [left, middle, right] if self.width % 2 else [left, right]
        columns = [part.unflatten(1, (self.height, -1)) for part in parts]
        columns[-1] = columns[-1].flip(2)
        return torch.cat(columns, 2)

    def mirror(self, x: Tensor) -> Tensor:
        """Swap mirror images along the token axis of (B, N, C) in mirror order."""
        left, middle, right = x.split(self.blocks, 1)
        return torch.cat([right, middle, left], 1)


class MirrorOrder(FixedBuffers):
    """Holds the published index tensor `permutation`; `MirrorGrid` does the ordering itself."""

    def __init__(self, grid: MirrorGrid, device: torch.device | str | None = None) -> None:
        super().__init__()
        rule = f"the token order of a {grid.height} x {grid.width} grid"
        for name, index in self.indices(grid).items():
            self.register_fixed(name, index, rule, device)

    @staticmethod
    def indices(grid: MirrorGrid) -> dict[str, Tensor]:
        """The published names and values for this grid."""
        return {"permutation": grid.permutation()}


class MirrorHalves(MirrorOrder):
    """The same order as published for decomposed tokens: `left_idx` and `right_idx`.

    Row-major patches of the left half, and of their mirror images; with an odd width there is a
    `middle_idx` too.
    """

    @staticmethod
    def indices(grid: MirrorGrid) -> dict[str, Tensor]:
        names = ("left_idx", "middle_idx", "right_idx")
        halves = zip(names, grid.permutation().split(grid.blocks), strict=True)
        return {k: v.clone() for k, v in halves if k != "middle_idx" or grid.width % 2}


class PositionEmbedding(nn.Module):
    """A position embedding that flopping leaves alone.

    Keys: `0`, (1, N_left + N_middle, C/2), added to s at both mirror images; `1`, (1, N_left, C/2),
    added to a on the left and subtracted on the right. On the middle column a gets nothing.
    """

    def __init__(self, dim: int, grid: MirrorGrid, **dd: Any) -> None:
        super().__init__()
        self.grid = grid
        half = dim // 2
        left, middle, _ = grid.blocks
        self.register_parameter("0", nn.Parameter(torch.empty(1, left + middle, half, **dd)))
        self.register_parameter("1", nn.Parameter(torch.empty(1, left, half, **dd)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal, standard deviation 0.02."""
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, grid: MirrorGrid | None = None) -> tuple[Tensor, Tensor]:
        """The embedding in mirror order, two parts (1, N, C/2); resampled if `grid` is another."""
        # getattr and not get_parameter, which refuses the stand-ins of symbolic tracers
        sym, asym = getattr(self, "0"), getattr(self, "1")
        if grid is None:
            grid = self.grid
        # by number: compilers compare no data classes of sizes that they keep open
        elif (grid.height, grid.width) != (self.grid.height, self.grid.width):
            sym, asym = resample(sym, asym, self.grid, grid)
        return whole(sym, asym, grid)

    def set_grid(self, grid: MirrorGrid) -> None:
        """Resample the parameters to another grid, in place of the old ones."""
        if grid == self.grid:
            return
        with torch.no_grad():
            values = resample(self.get_parameter("0"), self.get_parameter("1"), self.grid, grid)
        for name, value in zip("01", values, strict=True):
            requires_grad = self.get_parameter(name).requires_grad
            self.register_parameter(name, nn.Parameter(value, requires_grad=requires_grad))
        self.grid = grid


def whole(sym: Tensor, asym: Tensor, grid: MirrorGrid) -> tuple[Tensor, Tensor]:
    """Both parts on all tokens in mirror order, from the halves that are stored."""
    middle = asym.new_zeros(1, grid.rep.fixed, asym.shape[-1])
    return torch.cat([sym, sym[:, : grid.rep.free]], 1), torch.cat([asym, middle, -asym], 1)


def resample(sym: Tensor, asym: Tensor, old: MirrorGrid, new: MirrorGrid) -> tuple[Tensor, Tensor]:
    """Bicubic interpolation of the two halves of a position embedding from one grid to another.

    Only the left half is kept, and the right one built from it: whatever rounding the
    interpolation does, the embedding stays exactly equivariant. The antisymmetric part is
    interpolated through its sign change at the mirror axis, not up to it.
    """
    image = old.to_image_order(torch.cat(whole(sym, asym, old), -1)).flatten(1, 2)
    image = resample_abs_pos_embed(
        image,
        new_size=[new.height, new.width],
        old_size=[old.height, old.width],
        num_prefix_tokens=0,
    )
    tokens = new.to_mirror_order(image.unflatten(1, (new.height, new.width)))
    sym, asym = tokens.chunk(2, -1)
    return sym[:, : new.rep.free + new.rep.fixed].contiguous(), asym[:, : new.rep.free].contiguous()


class PrefixToken(FixedBuffers):
    """Learned tokens that belong to no place: key `0` is their s, key `1` their a, held at zero.

    Flopping maps such a token to itself, so its antisymmetric half must vanish.
    """

    def __init__(self, dim: int, count: int = 1, **dd: Any) -> None:
        super().__init__()
        sym = nn.Parameter(torch.empty(1, count, dim // 2, **dd))
        self.register_parameter("0", sym)
        zeros = torch.zeros(sym.shape, device="cpu", dtype=sym.dtype)
        self.register_fixed("1", zeros, "zero, as equivariance demands", sym.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal, standard deviation 0.02, and zero."""
        super().reset_parameters()
        nn.init.trunc_normal_(self.get_parameter("0"), std=0.02)

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """The tokens of a batch, two parts (batch, count, C/2)."""
        # sizes as one tuple: symbolic tracers stand in for parameters, and not for buffers
        size = (batch, -1, -1)
        return getattr(self, "0").expand(size), getattr(self, "1").expand(size)
