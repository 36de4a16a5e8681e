r"""Groups that act on images, their irreps, and the change of basis that splits features into them.

A group element g moves pixels (or tokens) and mixes channels. Over the channels we use the
*regular representation*: one channel per group element, permuted by h -> gh. A change of basis
splits it into irreducible representations (irreps),

    f^_{rho, ij} = sqrt(d_rho / |G|) * sum_h rho_ij(h) f(h),

where irrep rho of dimension d_rho appears d_rho times and g acts on index i alone, by rho(g). By
Schur's lemma a linear map that commutes with G cannot mix different irreps and acts the same on
every i: its matrix is block-diagonal. For flopping (G = {e, mirror}) that is the pair

    s = (r_e + r_m) / sqrt 2   (symmetric),      a = (r_e - r_m) / sqrt 2   (antisymmetric),

and half the multiply-adds (arXiv:2502.05169, sections 2 and 3). The eight-element octic group has a
two-dimensional irrep (arXiv:2505.15441); everything here holds for it too.

A `Rep` says which irreps a feature holds and how often. Between layers a feature is a tuple of
*parts*, one tensor for each irrep; within a part the d_rho components lie one after the other, each
as wide as the irrep's multiplicity. Concatenated along an axis the parts make one *packed* tensor;
for flopping that is (..., [s | a]).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from math import isclose, sqrt

import torch
from torch import Tensor

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Irrep:
    """A real orthogonal irreducible representation: one (d, d) matrix for each group element."""

    name: str
    matrices: tuple[Matrix, ...]

    @property
    def dim(self) -> int:
        return len(self.matrices[0])

    @property
    def is_trivial(self) -> bool:
        return self.dim == 1 and all(m == ((1.0,),) for m in self.matrices)


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group with its multiplication table, its irreps and its action on images.

    Attributes:
        elements: names; the identity is first.
        table: table[g][h] is the index of the product gh.
        irreps: all of them, the trivial one first; sum of dim**2 is the order.
        image_action: (mirrored, quarter_turns) of each element: first mirror left to right if
            `mirrored`, then turn counter-clockwise. None for a group that does not act on images.
    """

    name: str
    elements: tuple[str, ...]
    table: tuple[tuple[int, ...], ...]
    irreps: tuple[Irrep, ...]
    image_action: tuple[tuple[bool, int], ...] | None = None

    def __post_init__(self) -> None:
        if not self.irreps[0].is_trivial:
            raise ValueError(f"the first irrep of {self.name} must be the trivial one")
        if sum(irrep.dim**2 for irrep in self.irreps) != self.order:
            raise ValueError(
                f"the squared dimensions of the irreps of {self.name} must sum to {self.order}"
            )

    def __deepcopy__(self, memo: dict) -> Group:
        # groups are constants and compared by identity: copies of a module share them
        return self

    def __reduce__(self) -> str | tuple:
        # and so do pickled ones: the groups of this file are pickled by name
        names = [name for name, value in globals().items() if value is self]
        return names[0] if names else (Group, tuple(getattr(self, f.name) for f in fields(self)))

    @property
    def order(self) -> int:
        return len(self.elements)

    def inverse(self, g: int) -> int:
        """Index of the inverse of element `g`."""
        return self.table[g].index(0)

    @cached_property
    def change_of_basis(self) -> Tensor:
        """The orthogonal matrix Q, (|G|, |G|) in float64, from the regular basis to the irreps.

        Rows are the matrix entries sqrt(d/|G|) rho_ij in packed order, columns the elements.
        """
        rows = [
            [sqrt(irrep.dim / self.order) * matrix[i][j] for matrix in irrep.matrices]
            for irrep in self.irreps
            for i in range(irrep.dim)
            for j in range(irrep.dim)
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def act_on_image(self, g: int, images: Tensor) -> Tensor:
        """Apply element `g` to images (..., H, W). Quarter turns swap H and W."""
        if self.image_action is None:
            raise ValueError(f"the group {self.name} has no action on images")
        mirrored, turns = self.image_action[g]
        if mirrored:
            images = images.flip(-1)
        return torch.rot90(images, turns, (-2, -1)) if turns else images

    def mix(self, pieces: Sequence[Tensor], inverse: bool, gain: float = 1.0) -> list[Tensor]:
        """Multiply |G| tensors of one shape by `gain` times Q, or its transpose if `inverse`.

        `pieces` are the irreps' components in packed order, or the copies of the regular basis.
        """
        if self.order == 2:  # the butterfly; elementwise, and without a factor where gain undoes it
            x, y = pieces
            factor = gain * sqrt(0.5)
            if isclose(factor, 1.0):
                return [x + y, x - y]
            return [(x + y) * factor, (x - y) * factor]
        stacked = torch.stack(list(pieces))
        q = self.change_of_basis.to(stacked) * gain
        mixed = torch.tensordot(q.mT if inverse else q, stacked, dims=1)
        return [mixed[i] for i in range(self.order)]

    def regular(self, features: int) -> Rep:
        """The `Rep` of `features` channels in copies of the regular representation.

        Raises:
            ValueError: if `features` is not a multiple of the group's order.
        """
        if features <= 0 or features % self.order:
            raise ValueError(
                f"{features} features cannot hold whole copies of the regular representation of "
                f"{self.name}: use a positive multiple of {self.order}"
            )
        return Rep(self, free=features // self.order)


@dataclass(frozen=True)
class Rep:
    """How a group acts along one axis: `free` regular copies and `fixed` invariant entries.

    Over channels `fixed` is 0 inside a network and the number of colours at its input. Over tokens
    `free` is the number of tokens in the left half of the grid, and `fixed` the number of tokens in
    a middle column, which flopping maps to itself.
    """

    group: Group
    free: int
    fixed: int = 0

    @property
    def size(self) -> int:
        """Length of the axis."""
        return self.group.order * self.free + self.fixed

    def multiplicity(self, irrep: Irrep) -> int:
        """How many copies of `irrep` there are: the width of each of its components."""
        return irrep.dim * self.free + (self.fixed if irrep.is_trivial else 0)

    @property
    def invariant(self) -> int:
        """Number of entries that no element of the group changes; they come first."""
        return self.free + self.fixed

    @property
    def sizes(self) -> list[int]:
        """Length of each irrep's block along the axis, in order."""
        return [irrep.dim * self.multiplicity(irrep) for irrep in self.group.irreps]

    def split(self, x: Tensor, dim: int = -1) -> list[Tensor]:
        """The parts of a packed tensor, as views."""
        return _pieces(x, self.sizes, dim)

    def to_regular(self, x: Tensor, dim: int = -1, gain: float = 1.0) -> Tensor:
        """From the packed basis to the one in which the group permutes entries; same shape.

        Order: the copy of the identity, the fixed entries, then the copies of the other elements.
        For tokens that is the left half of the grid, its middle column, the right half mirrored.
        The result is multiplied by `gain`.
        """
        return self._change_basis(x, dim, gain, inverse=True)

    def from_regular(self, x: Tensor, dim: int = -1, gain: float = 1.0) -> Tensor:
        """The inverse of `to_regular`, multiplied by `gain`."""
        return self._change_basis(x, dim, gain, inverse=False)

    def _change_basis(self, x: Tensor, dim: int, gain: float, inverse: bool) -> Tensor:
        # both bases are |G| pieces of length `free`, with the fixed entries after the first
        sizes = [self.free] * self.group.order
        if self.fixed:
            sizes.insert(1, self.fixed)
        pieces = _pieces(x, sizes, dim)
        fixed = [pieces.pop(1) * gain] if self.fixed else []
        first, *rest = self.group.mix(pieces, inverse, gain)
        return torch.cat([first, *fixed, *rest], dim)

    def act(self, g: int, x: Tensor, dim: int = -1) -> Tensor:
        """Apply group element `g` to a packed tensor along `dim`; same shape."""
        return torch.cat(self.act_on_parts(g, self.split(x, dim), dim), dim)

    def act_on_parts(self, g: int, parts: Sequence[Tensor], dim: int = -1) -> tuple[Tensor, ...]:
        """Apply group element `g` to a feature of one tensor an irrep; same shapes."""
        moved = []
        for part, irrep in zip(parts, self.group.irreps, strict=True):
            components = _pieces(part, [self.multiplicity(irrep)] * irrep.dim, dim)
            rows = []
            for row in irrep.matrices[g]:
                first, *others = (c * x for c, x in zip(row, components, strict=True))
                rows.append(sum(others, first))
            moved.append(rows[0] if len(rows) == 1 else torch.cat(rows, dim))
        return tuple(moved)


def _pieces(x: Tensor, sizes: list[int], dim: int) -> list[Tensor]:
    # indexing and not unpacking: symbolic tracers cannot iterate over the result of split
    pieces = x.split(sizes, dim)
    return [pieces[i] for i in range(len(sizes))]


def direct_product(first: Group, second: Group) -> Group:
    """The product group: elements (g, h), irreps rho x sigma; it has no action on images.

    With flopping twice it describes features whose tokens and channels are both decomposed: the
    irreps are ss, sa, as, aa (channels first) and flopping itself is the diagonal element.
    """
    n, m = first.order, second.order
    table = tuple(
        tuple(first.table[i // m][j // m] * m + second.table[i % m][j % m] for j in range(n * m))
        for i in range(n * m)
    )
    irreps = tuple(
        Irrep(
            f"{rho.name}_{sigma.name}",
            tuple(_kron(a, b) for a in rho.matrices for b in sigma.matrices),
        )
        for rho in first.irreps
        for sigma in second.irreps
    )
    elements = tuple(f"{g},{h}" for g in first.elements for h in second.elements)
    return Group(f"{first.name} x {second.name}", elements, table, irreps)


def _kron(a: Matrix, b: Matrix) -> Matrix:
    return tuple(tuple(x * y for x in row_a for y in row_b) for row_a in a for row_b in b)


def _characters(name: str, values: Sequence[int]) -> Irrep:
    return Irrep(name, tuple(((float(v),),) for v in values))


@lru_cache(maxsize=1)
def _octic() -> Group:
    """The symmetries of the square: element 4f + k mirrors f times, then turns k quarters."""
    elements = [(bool(f), k) for f in (0, 1) for k in range(4)]

    # turn^k mirror^f turn^l mirror^m = turn^(k -+ l) mirror^(f + m): a mirror reverses turns
    def product(i: int, j: int) -> int:
        (f, k), (m, turns) = elements[i], elements[j]
        return 4 * (f ^ m) + (k + (-turns if f else turns)) % 4

    def plane(f: bool, k: int) -> Matrix:
        cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[k]
        x = -1.0 if f else 1.0  # the mirror is diag(-1, 1); a turn by 90 degrees comes after it
        return ((cos * x, -float(sin)), (sin * x, float(cos)))

    mirrored = [f for f, _ in elements]
    turned = [k % 2 for _, k in elements]
    return Group(
        "octic",
        tuple(f"{'m' if f else ''}r{k}" if k else ("m" if f else "e") for f, k in elements),
        tuple(tuple(product(i, j) for j in range(8)) for i in range(8)),
        (
            _characters("a1", [1] * 8),
            _characters("a2", [-1 if f else 1 for f in mirrored]),
            _characters("b1", [-1 if t else 1 for t in turned]),
            _characters("b2", [-1 if f ^ t else 1 for f, t in zip(mirrored, turned, strict=True)]),
            Irrep("e", tuple(plane(f, k) for f, k in elements)),
        ),
        tuple(elements),
    )


FLOP = Group(
    "flop",
    ("e", "m"),
    ((0, 1), (1, 0)),
    (_characters("sym", [1, 1]), _characters("asym", [1, -1])),
    ((False, 0), (True, 0)),
)
FLOP_X_FLOP = direct_product(FLOP, FLOP)
OCTIC = _octic()
