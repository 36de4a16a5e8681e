"""Which networks to measure, compared with which, and how to build one for a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
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
    twins = [twin for twin in map(twin_of, own) if twin and timm.is_model(twin)]
    known = list(dict.fromkeys([*own, *twins]))
    names: dict[str, None] = {}
    for pattern in patterns:
        exact = timm.is_model(pattern)
        found = [pattern] if exact else [name for name in known if fnmatchcase(name, pattern)]
        if not found:
            raise UserError(
                f"--models {pattern}: no network has this name, and no glob of ours fits"
                f"{suggest(pattern, known)}"
            )
        names.update(dict.fromkeys(found))
    return list(names)


def comparisons(names: Sequence[str], *, folded: bool = False) -> list[tuple[str, ...]]:
    """Networks that are compared, and so timed in turns: a twin, then all of ours that have it.

    Twins that are not among `names` are added. The order is that of first appearance.

    Args:
        folded: add the folded form of each equivariant network behind it.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        twin = twin_of(name)
        first = twin if twin is not None and timm.is_model(twin) else name
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
    if name.endswith(FOLDED):
        name = name.removesuffix(FOLDED)
        model, size = build(name, img_size, arguments, device=device, dtype=dtype)
        return fold(model), size
    config = get_pretrained_cfg(name)
    size = img_size or (config.input_size[-1] if config else 224)
    kwargs = dict(arguments or {})
    given = [f"{key}={value}" for key, value in kwargs.items()]
    if img_size is not None:
        given.insert(0, f"--img-size {size}")
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
    return model.to(dtype).eval(), size


def has_asym_feats(name: str) -> bool:
    """Whether antisymmetric features reach the head of the network."""
    return name.startswith(("d2_deit_", "d2_convnext_", "resmlp_equi_"))


def on_meta(
    name: str, img_size: int | None = None, arguments: Mapping[str, Any] | None = None
) -> tuple[nn.Module, torch.Tensor]:
    """A network without memory and one image for it, to count what it would do."""
    model, size = build(name, img_size, arguments, device="meta")
    return model, torch.empty(1, 3, size, size, device="meta")
