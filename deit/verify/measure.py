r"""Equivariance in numbers.

A feature f holds if for every image x and group element g

    |f(g x) - g f(x)| / |f(x)|  <=  tolerance(dtype),

where the norms are taken over all of one sample's entries. It must also be worth something: f(x)
is finite and not zero, and every irrep's part of it differs between images,

    |f(x_i) - f(x_j)| / |f(x_j)|  >  tolerance  (and > 1e-6).

**Tolerance.** Rounding each stored entry leaves a relative error of about 0.3 eps in the norm,
where eps is the spacing of the dtype; a sum of K products leaves up to sqrt(K)/2 eps of the dtype
that it is accumulated in, which is float32 for the 16-bit types. Flopping reorders sums, so f(gx)
and g f(x) carry different rounding. Residual branches add to the stream and norms rescale it, so
the errors of successive layers average out more than they add up. The tolerance is 5 eps of the
stored dtype plus 60 eps of the accumulating one, times sqrt(depth/12) for networks of more than 12
blocks. Networks of every family with random parameters stay below a third of it in float64 and
float32 and below two thirds in bfloat16; an ordinary network is off by more than 1e-1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, isnan

import torch
from torch import Tensor

from deit.equivariance import Action

__all__ = [
    "Feature",
    "Measurement",
    "gradient_errors",
    "is_far_off",
    "measure",
    "tolerance",
    "worst",
]

STORED, ACCUMULATED = 5, 60
USUAL_DEPTH = 12
# below this, "different" outputs of different images would be a matter of rounding
LEAST_CONTRAST = 1e-6


def tolerance(dtype: torch.dtype, depth: int = 1) -> float:
    """The largest relative error that rounding explains, in a network of `depth` blocks."""
    half = dtype in (torch.bfloat16, torch.float16)
    accumulator = torch.float32 if half else dtype
    single = STORED * torch.finfo(dtype).eps + ACCUMULATED * torch.finfo(accumulator).eps
    return single * max(1.0, depth / USUAL_DEPTH) ** 0.5


@dataclass(frozen=True)
class Feature:
    """How the group acts on a feature, (B, ...), and the parts that its irreps split it into.

    A `constant` feature does not depend on the image: a position embedding, a class token.
    """

    act: Action
    parts: Callable[[Tensor], list[Tensor]] = lambda x: [x]
    constant: bool = False


@dataclass(frozen=True)
class Measurement:
    """`errors`: of each sample; `contrast`: between samples, the smallest over all irreps."""

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
            return f"vacuous: different images differ by only {self.contrast:.1e}"
        return None


def is_far_off(twin: float, own: float, tol: float) -> bool:
    """Whether an ordinary twin's error is beyond doubt: ten times our own, and two tolerances."""
    return twin > max(10 * own, 2 * tol)


def worst(*errors: float) -> float:
    """The largest, where NaN is larger than all."""
    return max(errors, key=lambda error: float("inf") if isnan(error) else error)


def measure(y: Tensor, moved: Iterable[tuple[int, Tensor]], feature: Feature) -> Measurement:
    """Compare y = f(x), (B, ...), with pairs (g, f(gx)).

    Computed in float64, so that the measurement adds no rounding of its own.

    Raises:
        ValueError: if there are fewer than two samples to tell apart.
    """
    if y.shape[0] < 2 and not feature.constant:
        raise ValueError(f"{y.shape[0]} samples cannot show that outputs differ: give two or more")
    y = y.detach().double()
    errors = torch.stack(
        [_relative(z.detach().double() - feature.act(g, y), y) for g, z in moved]
    ).amax(0)
    contrast = float("inf")
    if not feature.constant:
        # each sample against the one before it; amin and amax pass NaN on
        contrast = torch.stack(
            [_relative(part[1:] - part[:-1], part[:-1]).amin() for part in feature.parts(y)]
        ).amin()
    return Measurement(tuple(errors.tolist()), float(contrast))


def _relative(difference: Tensor, reference: Tensor) -> Tensor:
    """Norm of each sample of `difference` over that of `reference`, (B,); 0/0 is NaN."""
    norm = torch.linalg.vector_norm
    return norm(difference.flatten(1), dim=1) / norm(reference.flatten(1), dim=1)


def gradient_errors(
    expected: Mapping[str, Tensor | None], found: Mapping[str, Tensor | None], floor: float
) -> dict[str, float]:
    """Relative error of each gradient; infinite if only one of the two exists.

    A gradient much smaller than the others is what rounding leaves of terms that cancel, so no
    error is taken relative to less than `floor` times the largest norm. If all gradients vanish,
    the errors are NaN.
    """
    norms = {
        name: torch.linalg.vector_norm(gradient.double()).item()
        for name, gradient in expected.items()
        if gradient is not None
    }
    least = floor * worst(*norms.values())
    errors = {}
    for name, gradient in expected.items():
        other = found[name]
        if gradient is None and other is None:
            continue
        if gradient is None or other is None:
            errors[name] = float("inf")
            continue
        difference = torch.linalg.vector_norm(other.double() - gradient.double()).item()
        reference = worst(norms[name], least)
        errors[name] = difference / reference if reference else float("nan")
    return errors
