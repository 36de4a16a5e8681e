r"""Check that a module commutes with a group: f(g x) = g f(x) for every element g.

    layer = Linear(8, 16)
    x = tuple(layer.in_rep.split(torch.randn(2, 5, 8)))  # features are tuples of parts
    assert_equivariant(layer, FLOP, x, channels(layer.in_rep), channels(layer.out_rep))

The error is relative, |f(g x) - g f(x)| / |f(x)|, with norms over all of one sample's entries. A
check can pass for the wrong reason: a module that ignores its input is equivariant too. So f(x)
must also be finite and not zero, and each part of it must differ between samples.

**Tolerance.** Rounding each stored entry leaves a relative error of about 0.3 eps in the norm,
where eps is the spacing of the dtype; a sum of K products leaves up to sqrt(K)/2 eps of the dtype
that it is accumulated in, which is float32 for the 16-bit types. Flopping reorders sums, so f(gx)
and g f(x) carry different rounding. Residual branches add to the stream and norms rescale it, so
the errors of successive layers average out more than they add up. The tolerance is 5 eps of the
stored dtype plus 60 eps of the accumulating one, times sqrt(depth/12) for networks of more than 12
blocks. An ordinary network is off by more than 1e-1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan
from typing import Any

import torch
from torch import Tensor, nn

from deit.groups import Group, Rep

Feature = Tensor | tuple[Tensor, ...]
Action = Callable[[int, Any], Any]  # of a group element on a feature

STORED, ACCUMULATED = 5, 60
USUAL_DEPTH = 12
# below this, "different" outputs of different inputs would be a matter of rounding
LEAST_CONTRAST = 1e-6


def tolerance_of(dtype: torch.dtype, depth: int = 1) -> float:
    """The largest relative error that rounding explains, in a network of `depth` blocks."""
    half = dtype in (torch.bfloat16, torch.float16)
    accumulator = torch.float32 if half else dtype
    single = STORED * torch.finfo(dtype).eps + ACCUMULATED * torch.finfo(accumulator).eps
    return single * max(1.0, depth / USUAL_DEPTH) ** 0.5


def as_parts(x: Feature) -> tuple[Tensor, ...]:
    """The parts of a feature; a tensor is one part."""
    return x if isinstance(x, tuple) else (x,)


def map_parts(change: Callable[[Tensor], Tensor], x: Feature) -> Feature:
    """Change a tensor, or each part of a tuple."""
    return tuple(map(change, x)) if isinstance(x, tuple) else change(x)


def image(group: Group) -> Action:
    """The group moves pixels: (..., H, W)."""
    return lambda g, x: map_parts(lambda part: group.act_on_image(g, part), x)


def invariant(g: int, x: Feature) -> Feature:
    """The group does nothing: logits, pooled invariant features."""
    return x


def channels(rep: Rep, dim: int = -1) -> Action:
    """The group mixes channels along `dim`: of parts, or of one packed tensor."""
    return lambda g, x: (rep.act_on_parts if isinstance(x, tuple) else rep.act)(g, x, dim)


def tokens(mirror: Callable[[Tensor], Tensor]) -> Action:
    """Flopping exchanges tokens, of every part, by `mirror`, for instance `MirrorGrid.mirror`."""
    return lambda g, x: map_parts(mirror, x) if g else x


def compose(*actions: Action) -> Action:
    """Apply several actions of the same element, for instance on channels and on tokens."""

    def act(g: int, x: Feature) -> Feature:
        for action in actions:
            x = action(g, x)
        return x

    return act


@dataclass(frozen=True)
class EquivarianceReport:
    """`errors`: the largest |f(gx) - g f(x)| / |f(x)| over the group, of each sample.

    `contrast`: how much samples differ, |f(x_i) - f(x_j)| / |f(x_j)|, the smallest over
    neighbours and parts; it says that f does look at its input.
    """

    errors: tuple[float, ...]
    contrast: float

    @property
    def error(self) -> float:
        """The largest error; NaN if any is."""
        return worst(*self.errors)

    def problem(self, tol: float) -> str | None:
        """What is wrong, in words, or None."""
        if not isfinite(self.error):
            return "not finite, or zero"
        if self.error > tol:
            return f"error {self.error:.1e} > tolerance {tol:.1e}"
        # "not >" so that NaN fails too
        if not self.contrast > max(tol, LEAST_CONTRAST):
            return f"vacuous: outputs of different inputs differ by only {self.contrast:.1e}"
        return None

    def __str__(self) -> str:
        return f"error={self.error:.1e}, contrast={self.contrast:.1e}"


def worst(*errors: float) -> float:
    """The largest, where NaN is larger than all."""
    return max(errors, key=lambda error: inf if isnan(error) else error)


def measure(
    outputs: Sequence[Feature],
    act: Action,
    pieces: Callable[[Feature], tuple[Tensor, ...]] = as_parts,
    constant: bool = False,
) -> EquivarianceReport:
    """Compare f(gx) with g f(x); computed in float64, which adds no rounding of its own.

    Args:
        outputs: f(gx), (B, ...), for each element g of the group; the first is f(x).
        act: how the group acts on them.
        pieces: what of f(x) must differ between samples, each by itself.
        constant: f(x) depends on no input, as a position embedding (1, N, C).

    Raises:
        ValueError: if there are fewer than two samples to tell apart.
    """
    y, *moved = (map_parts(lambda part: part.detach().double(), output) for output in outputs)
    count = len(as_parts(y)[0])
    if count < 2 and not constant:
        raise ValueError(f"{count} samples cannot show that outputs differ: give two or more")
    errors = []
    for g, z in enumerate(moved, 1):
        difference = [p - q for p, q in zip(as_parts(z), as_parts(act(g, y)), strict=True)]
        errors.append(_relative(difference, as_parts(y)))
    contrast = inf
    if not constant:
        # each sample against the one before it; amin and amax pass NaN on
        steps = [
            _relative([piece[1:] - piece[:-1]], [piece[:-1]]).amin()
            for piece in pieces(y)
            if piece.numel()
        ]
        contrast = float(torch.stack(steps).amin())
    return EquivarianceReport(tuple(torch.stack(errors).amax(0).tolist()), contrast)


def _relative(difference: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """Norm of each sample of `difference` over that of `reference`, (B,); 0/0 is NaN."""

    def norm(parts: Sequence[Tensor]) -> Tensor:
        rows = [part.reshape(len(part), -1) for part in parts if part.numel()]
        return torch.linalg.vector_norm(torch.cat(rows, 1), dim=1)

    return norm(difference) / norm(reference)


@torch.no_grad()
def equivariance_error(
    module: Callable[[Any], Feature],
    group: Group,
    x: Feature,
    on_input: Action,
    on_output: Action,
) -> EquivarianceReport:
    """Measure by how much `module` fails to commute with `group` on the batch `x`.

    Args:
        module: a function of one batch, (B, ...) with B >= 2 different samples, or of its parts.
        on_input, on_output: how each group element acts before and after.

    Raises:
        ValueError: if the batch holds fewer than two samples.
    """
    moved = [module(on_input(g, x)) for g in range(1, group.order)]
    return measure([module(x), *moved], on_output)


def assert_equivariant(
    module: Callable[[Any], Feature],
    group: Group,
    x: Feature,
    on_input: Action,
    on_output: Action,
    tolerance: float | None = None,
) -> EquivarianceReport:
    """Raise AssertionError unless `module` commutes with `group` and tells samples apart.

    Args: as `equivariance_error`; `tolerance` follows from the dtype of `x` if it is None.
    """
    dtype = as_parts(x)[0].dtype
    report = equivariance_error(module, group, x, on_input, on_output)
    if problem := report.problem(tolerance_of(dtype) if tolerance is None else tolerance):
        what = "" if problem.startswith("vacuous") else f"not equivariant under {group.name}: "
        raise AssertionError(f"{what}{problem} ({dtype})")
    return report


@torch.no_grad()
def randomize_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill all parameters with random values of a useful scale; returns `module`.

    No term of a layer is hidden by its initial zero or one. Scales are near one, weights keep the
    size of features, and shifts and embeddings are small beside them: outputs depend on the input.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        leaf = name.rsplit(".", 1)[-1]
        is_vector = parameter.ndim == 1
        is_scale = leaf.startswith(("alpha", "attn_mixer")) or "gamma" in name
        if is_scale or (is_vector and leaf == "weight"):
            noise = 1 + 0.3 * noise
        elif is_vector or parameter.shape[0] == 1:
            noise = 0.2 * noise
        else:
            noise = noise / max(parameter[:1].numel(), 1) ** 0.5
        parameter.copy_(noise)
    return module
