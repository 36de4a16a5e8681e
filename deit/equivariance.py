"""Check that a module commutes with a group: f(g x) = g f(x) for every element g.

    layer, x = Linear(8, 16), torch.randn(2, 5, 8)
    assert_equivariant(layer, FLOP, x, channels(layer.in_rep), channels(layer.out_rep))

A check can pass for the wrong reason: a module that ignores its input is equivariant too. So the
report also says how far apart the outputs of different inputs are, and `assert_equivariant` fails
if they do not differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deit.groups import Group, Rep

__all__ = [
    "TOLERANCE",
    "Action",
    "EquivarianceReport",
    "assert_equivariant",
    "channels",
    "compose",
    "equivariance_error",
    "image",
    "invariant",
    "randomize_",
    "tokens",
]

Action = Callable[[int, Tensor], Tensor]

# Relative to the norm of the output; rounding grows with depth, not with the size of a layer.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 5e-2,
    torch.bfloat16: 1e-1,
}


def image(group: Group) -> Action:
    """The group moves pixels: (..., H, W)."""
    return group.act_on_image


def invariant(g: int, x: Tensor) -> Tensor:
    """The group does nothing: logits, pooled invariant features."""
    return x


def channels(rep: Rep, dim: int = -1) -> Action:
    """The group mixes packed channels along `dim`."""
    return lambda g, x: rep.act(g, x, dim)


def tokens(mirror: Callable[[Tensor], Tensor]) -> Action:
    """Flopping exchanges tokens by `mirror`, for instance `MirrorGrid.mirror`."""
    return lambda g, x: mirror(x) if g else x


def compose(*actions: Action) -> Action:
    """Apply several actions of the same element, for instance on channels and on tokens."""

    def act(g: int, x: Tensor) -> Tensor:
        for action in actions:
            x = action(g, x)
        return x

    return act


@dataclass(frozen=True)
class EquivarianceReport:
    """`error`: largest |f(gx) - g f(x)| / |f(x)| over the group; `contrast`: the smallest
    |f(x_i) - f(x_0)| / |f(x_0)| between samples, which says that f does look at its input."""

    error: float
    contrast: float


@torch.no_grad()
def equivariance_error(
    module: Callable[[Tensor], Tensor],
    group: Group,
    x: Tensor,
    on_input: Action,
    on_output: Action,
) -> EquivarianceReport:
    """Measure by how much `module` fails to commute with `group` on the batch `x`.

    Args:
        module: a function of one batch, (B, ...) with B >= 2 different samples.
        on_input, on_output: how each group element acts before and after.

    Raises:
        ValueError: if the batch holds fewer than two samples.
    """
    if x.shape[0] < 2:
        raise ValueError(f"{x.shape[0]} samples cannot show that outputs differ: give two or more")
    # g f(x) is computed in float64, so that the check adds no rounding of its own
    y = module(x).double()
    norm = torch.linalg.vector_norm(y)
    errors = [
        torch.linalg.vector_norm(module(on_input(g, x)).double() - on_output(g, y)) / norm
        for g in range(1, group.order)
    ]
    flat = y.flatten(1)
    contrast = torch.linalg.vector_norm(flat[1:] - flat[:1], dim=1)
    contrast = contrast / torch.linalg.vector_norm(flat[0])
    return EquivarianceReport(max(errors).item(), contrast.min().item())


def assert_equivariant(
    module: Callable[[Tensor], Tensor],
    group: Group,
    x: Tensor,
    on_input: Action,
    on_output: Action,
    tolerance: float | None = None,
) -> EquivarianceReport:
    """Raise AssertionError unless `module` commutes with `group` and tells samples apart.

    Args: as `equivariance_error`; `tolerance` follows from the dtype of `x` if it is None.
    """
    tolerance = TOLERANCE[x.dtype] if tolerance is None else tolerance
    report = equivariance_error(module, group, x, on_input, on_output)
    # "not <=" so that NaN fails too
    if not report.error <= tolerance:
        raise AssertionError(
            f"not equivariant under {group.name}: relative error {report.error:.2e}, "
            f"tolerance {tolerance:.0e} ({x.dtype})"
        )
    if not report.contrast > max(10 * tolerance, 1e-6):
        raise AssertionError(
            f"vacuous: outputs of different inputs differ by only {report.contrast:.2e}"
        )
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
