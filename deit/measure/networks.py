"""Which networks to measure, grouped with their twins, and how to build one for a measurement."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import nn

import deit.models
from deit.deploy import fold
from deit.errors import UserError, one_line, suggest
from deit.measure.published import twin_of
from deit.models.inputs import check_image_size

__all__ = [
    "Group",
    "build",
    "fold_too",
    "groups",
    "has_asym_feats",
    "on_meta",
    "own_networks",
    "select",
    "trainable",
]


EQUIVARIANT = ("d2_deit_", "d2_convnext_", "resmlp_equi_")
HYBRIDS = ("hybrid_deit_", "d2_inv_early_deit_")
FOLDED = ", folded"  # behind the name of a network: its form for deployment


@dataclass(frozen=True)
class Group:
    """Networks that are compared with each other, and so timed in turns: a twin comes first."""

    names: tuple[str, ...]


def own_networks() -> list[str]:
    """The names of the networks of this package."""
    package = deit.models.__name__ + "."
    return [name for name in timm.list_models() if _module(name).startswith(package)]


def _module(name: str) -> str:
    return model_entrypoint(name).__module__


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
        if timm.is_model(pattern):
            found = [pattern]
        else:
            found = [name for name in known if fnmatchcase(name, pattern)]
        if not found:
            raise UserError(
                f"--models {pattern}: no network has this name, and no glob of ours fits"
                f"{suggest(pattern, known)}"
            )
        names.update(dict.fromkeys(found))
    return list(names)


def groups(names: Sequence[str]) -> list[Group]:
    """The networks with their twins added: one group for each twin, in order of appearance."""
    members: dict[str, list[str]] = {}
    for name in names:
        twin = twin_of(name)
        first = twin if twin is not None and timm.is_model(twin) else name
        group = members.setdefault(first, [first])
        if name != first:
            group.append(name)
    return [Group(tuple(group)) for group in members.values()]


def fold_too(group: Group) -> Group:
    """The group with the folded form of each of its equivariant networks beside it."""
    names = []
    for name in group.names:
        names.append(name)
        if name.startswith((*EQUIVARIANT, *HYBRIDS)):
            names.append(name + FOLDED)
    return Group(tuple(names))


def build(
    name: str,
    *,
    img_size: int | None = None,
    symmetrized: bool = False,
    arguments: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, int]:
    """A network in evaluation mode, with fused attention, and the size of its images.

    Args:
        symmetrized: classify [s, |a|], if the network has antisymmetric features at its head.
        arguments: further ones of the network; those that it does not know are left out, so that
            a twin gets what it shares.

    A name with `FOLDED` behind it gives the folded network.

    Raises:
        UserError: a network that cannot have images of this size.
    """
    if name.endswith(FOLDED):
        options = dict(img_size=img_size, symmetrized=symmetrized, arguments=arguments)
        name = name.removesuffix(FOLDED)
        model, size = build(name, **options, device=device, dtype=dtype)
        return fold(model), size
    config = get_pretrained_cfg(name)
    size = img_size or (config.input_size[-1] if config else 224)
    kwargs = {"img_size": size} if config is not None and config.fixed_input_size else {}
    if symmetrized and has_asym_feats(name):
        kwargs["use_symmetrized_asym_feats"] = True
    try:
        with torch.device(device):
            model = _create(name, kwargs, dict(arguments or {}))
    except (ValueError, AssertionError, RuntimeError) as error:
        given = [] if img_size is None else [f"--img-size {size}"]
        given += [f"{key}={value}" for key, value in (arguments or {}).items()]
        if not given:
            raise
        raise UserError(f"{name} with {' '.join(given)}: {one_line(error)}") from error
    if img_size is not None:
        check_image_size(model, img_size, "--img-size", name)
    for module in model.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = True
    return model.to(dtype).eval(), size


def _create(name: str, kwargs: dict[str, Any], arguments: dict[str, Any]) -> nn.Module:
    """The network with `kwargs` and what it knows of `arguments`."""
    while True:
        try:
            return timm.create_model(name, **{**arguments, **kwargs})
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown.group(1) not in arguments:
                raise
            del arguments[unknown.group(1)]


def has_asym_feats(name: str) -> bool:
    """Whether antisymmetric features reach the head of the network."""
    return name.startswith(EQUIVARIANT)


def on_meta(
    name: str,
    img_size: int | None = None,
    *,
    symmetrized: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, torch.Tensor]:
    """A network without memory and one image for it, to count what it would do."""
    model, size = build(
        name, img_size=img_size, symmetrized=symmetrized, arguments=arguments, device="meta"
    )
    return model, torch.empty(1, 3, size, size, device="meta")


def trainable(model: nn.Module) -> int:
    """Number of parameters that training changes: index tensors and fixed zeros are none."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
