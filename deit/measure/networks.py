"""Which networks to measure, compared with which, and how to build one for a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import filter as matching
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import nn

import deit.models
from deit.deploy import fold
from deit.errors import UserError, one_line, suggest
from deit.models.inputs import check_image_size
from deit.models.published import twin_of
from deit.train.build import create_network

FOLDED = ", folded"  # behind the name of a network: its form for deployment
SYMMETRIZED = "use_symmetrized_asym_feats"  # the argument for classifying [s, |a|]


def own_networks() -> list[str]:
    """The names of the networks of this package."""
    package = deit.models.__name__ + "."
    return [n for n in timm.list_models() if model_entrypoint(n).__module__.startswith(package)]


def select(patterns: Sequence[str]) -> list[str]:
    """Names for `--models`: exact names of any timm network, globs over those of this package and
    their twins. In the order given, none twice.

    Raises:
        UserError: a name or glob that fits nothing.
    """
    own = own_networks()
    known = list(dict.fromkeys([*own, *filter(None, map(twin_of, own))]))
    names: list[str] = []
    for pattern in patterns:
        found = [pattern] if timm.is_model(pattern) else matching(known, pattern)
        if not found:
            raise UserError(
                f"--models {pattern}: no network has this name, and no glob of ours fits"
                f"{suggest(pattern, known)}"
            )
        names += found
    return list(dict.fromkeys(names))


def comparisons(names: Sequence[str], *, folded: bool = False) -> list[tuple[str, ...]]:
    """Networks that are compared, and so timed in turns: a twin, then all of ours that have it.

    Twins that are not among `names` are added. The order is that of first appearance.

    Args:
        folded: add the folded form of each equivariant network behind it.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        first = twin_of(name) or name
        members = found.setdefault(first, [first])
        if name != first:
            members += [name, name + FOLDED] if folded else [name]
    return [tuple(members) for members in found.values()]


def build(
    name: str,
    img_size: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, int]:
    """A network in evaluation mode, with fused attention, and the size of its images.

    Args:
        name: with `FOLDED` behind it for the folded network.
        img_size: the network's own without.
        arguments: further ones of the network; those that it does not know are left out, so that
            a twin gets what it shares.

    Raises:
        UserError: a network that cannot have images of this size, or these arguments.
    """
    folded, name = name.endswith(FOLDED), name.removesuffix(FOLDED)
    config = get_pretrained_cfg(name)
    size = img_size or (config.input_size[-1] if config else 224)
    kwargs = dict(arguments or {})
    given = [] if img_size is None else [f"--img-size {size}"]
    given += [f"{key}={value}" for key, value in kwargs.items()]
    if config is not None and config.fixed_input_size:
        kwargs["img_size"] = size
    if not has_asym_feats(name):
        kwargs.pop(SYMMETRIZED, None)
    try:
        with torch.device(device):
            model, _ = create_network(name, kwargs)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        if not given:
            raise
        raise UserError(f"{name} with {' '.join(given)}: {one_line(error)}") from error
    if img_size is not None:
        check_image_size(model, img_size, "--img-size", name)
    for module in model.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = True
    model = model.to(dtype).eval()
    return (fold(model) if folded else model), size


def has_asym_feats(name: str) -> bool:
    """Whether antisymmetric features reach the head of the network."""
    return name.startswith(("d2_deit_", "d2_convnext_", "resmlp_equi_"))
