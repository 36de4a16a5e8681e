"""Whole networks: which there are, and how each is made and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import timm
from timm.layers import to_2tuple
from torch import nn

import deit.models  # noqa: F401 - registers the networks
from deit.errors import UserError, one_line, suggest
from deit.models.published import twin_of
from deit.train.build import model_arguments
from deit.train.loading import build_as_trained
from deit.verify.check import Case

SIZE = 224
ODD = (112, 112)  # a grid with a middle column, for patches of 16 pixels
SMALL = (64, 96)
SYMMETRIZED = {"use_symmetrized_asym_feats": True}
MIXER = {"use_attn_mixer": True}
REGISTERS = {"class_token": False, "reg_tokens": 2, "global_pool": "avg"}
SCALED = {"layer_scale_init_value": 1e-6}


def network_case(
    name: str, variant: str = "", size: int | tuple[int, int] = SIZE, **options: Any
) -> Case:
    """A registered network, for images of a size, (height, width), made with `options`.

    Its `build` raises `UserError` if it cannot be built for these images.
    """
    size, twin_options = to_2tuple(size), {}
    if "convnext" not in name:
        twin_options["img_size"] = size
    if "patch_size" in options:
        twin_options["patch_size"] = options["patch_size"]

    def build() -> nn.Module:
        try:
            return timm.create_model(name, img_size=size, **options)
        except ValueError as error:
            raise UserError(f"{name} cannot be built: {one_line(error)}") from error

    build_twin = partial(timm.create_model, twin_of(name), **twin_options)
    return Case(name, variant, build, build_twin, size, is_network=True)


# On small images, with the options of each family.
VARIANTS = (
    network_case("d2_deit_tiny_patch16_LS", "mixer, symmetrized, odd", ODD, **SYMMETRIZED, **MIXER),
    network_case("d2_deit_tiny_patch16_LS", "registers, mean", SMALL, **REGISTERS),
    network_case("hybrid_deit_tiny_patch16_LS", "mixer, odd", ODD, **MIXER),
    network_case("d2_inv_early_deit_tiny_patch16_LS", "mixer, odd", ODD, **MIXER),
    network_case("resmlp_equi_d2_12", "symmetrized, odd", ODD, **SYMMETRIZED),
    network_case(
        "d2_convnext_isotropic_small", "LayerScale, symmetrized, odd", ODD, **SYMMETRIZED, **SCALED
    ),
    network_case("d2_convnext_tiny", "symmetrized, not square", SMALL, **SYMMETRIZED),
)


def default_networks(size: int = SIZE) -> list[Case]:
    """The smallest network of each family as it is used, each followed by its variants, which keep
    their own sizes."""
    cases: list[Case] = []
    for name in dict.fromkeys(variant.name for variant in VARIANTS):
        cases.append(network_case(name, size=size))
        cases += [variant for variant in VARIANTS if variant.name == name]
    return cases


def choose(patterns: list[str]) -> list[str]:
    """The networks that promise something and match names or globs, in the order of the patterns,
    each once.

    Raises:
        UserError: if a pattern matches none, or names an ordinary network.
    """
    known = [name for name in timm.list_models() if twin_of(name)]
    chosen: dict[str, None] = {}
    for pattern in patterns:
        matches = [name for name in known if fnmatchcase(name, pattern)]
        if not matches and timm.is_model(pattern):
            raise UserError(f"{pattern!r} is an ordinary network: nothing is promised of it")
        if not matches:
            raise UserError(f"no network matches {pattern!r}{suggest(pattern, known)}")
        chosen.update(dict.fromkeys(matches))
    return list(chosen)


def network_of(
    source: str, name: str | None, img_size: int | None, kwargs: Mapping[str, Any]
) -> Case:
    """The network of a checkpoint with its trained weights (not their average).

    Args:
        name: the model; None for the one that the checkpoint says it was trained as.
        img_size: for other images than it was trained on, if the network can take them.
        kwargs: arguments of the network in place of those that it was trained with.

    Raises:
        UserError: if the file cannot be read, its weights do not fit, or the model is unknown.
    """
    if name is not None:
        (name,) = choose([name])
    network, args = build_as_trained(source, model=name, img_size=img_size, kwargs=kwargs)
    choose([args.model])
    options = model_arguments(args, network.num_classes)
    case = network_case(args.model, "checkpoint", options.pop("img_size"), **options)
    return replace(case, trained=network)
