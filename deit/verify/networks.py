"""Whole networks: which there are, and how each is made and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import timm
from torch import Tensor, nn

import deit.models  # noqa: F401 - registers the networks
from deit.errors import UserError, one_line, suggest
from deit.models.published import twin_of
from deit.verify import samples
from deit.verify.check import Case
from deit.verify.rules import Rule, packed_map

__all__ = ["DEFAULT", "NetworkCase", "choose", "known_networks"]


@dataclass(frozen=True, eq=False)
class NetworkCase(Case):
    """A registered network, the arguments it is made with, and the image size, (height, width)."""

    options: Mapping[str, Any] = field(default_factory=dict)
    img_size: tuple[int, int] = (224, 224)
    is_network = True

    def build(self) -> nn.Module:
        """The network with its initial parameters, on the CPU.

        Raises:
            UserError: if it cannot be built for these images.
        """
        try:
            return timm.create_model(self.name, img_size=self.img_size, **self.options)
        except ValueError as error:
            raise UserError(f"{self.name} cannot be built: {one_line(error)}") from error

    def build_twin(self) -> nn.Module:
        options: dict[str, Any] = {} if "convnext" in self.name else {"img_size": self.img_size}
        if "patch_size" in self.options:
            options["patch_size"] = self.options["patch_size"]
        return timm.create_model(twin_of(self.name), **options)

    def inputs(self, count: int, seed: int) -> Tensor:
        return samples.images(count, self.img_size, seed)

    def maps(self, module: nn.Module) -> list[tuple[str, Rule]]:
        """Up to the bridge of a hybrid, behind which `symmetric_channels` is None."""
        return [
            (info["module"], packed_map(info["symmetric_channels"]))
            for info in module.feature_info
            if info["symmetric_channels"] is not None
        ]


SYMMETRIZED = {"use_symmetrized_asym_feats": True}
MIXER = {"use_attn_mixer": True}
REGISTERS = {"class_token": False, "reg_tokens": 2, "global_pool": "avg"}
ODD = (112, 112)  # a grid with a middle column, for patches of 16 pixels
# The smallest network of each family as it is used, and on small images with its options.
DEFAULT = (
    NetworkCase("d2_deit_tiny_patch16_LS"),
    NetworkCase(
        "d2_deit_tiny_patch16_LS", "mixer, symmetrized, odd", {**SYMMETRIZED, **MIXER}, ODD
    ),
    NetworkCase("d2_deit_tiny_patch16_LS", "registers, mean", REGISTERS, (64, 96)),
    NetworkCase("hybrid_deit_tiny_patch16_LS"),
    NetworkCase("hybrid_deit_tiny_patch16_LS", "mixer, odd", MIXER, ODD),
    NetworkCase("d2_inv_early_deit_tiny_patch16_LS"),
    NetworkCase("d2_inv_early_deit_tiny_patch16_LS", "mixer, odd", MIXER, ODD),
    NetworkCase("resmlp_equi_d2_12"),
    NetworkCase("resmlp_equi_d2_12", "symmetrized, odd", SYMMETRIZED, ODD),
    NetworkCase("d2_convnext_isotropic_small"),
    NetworkCase(
        "d2_convnext_isotropic_small",
        "LayerScale, symmetrized, odd",
        {**SYMMETRIZED, "layer_scale_init_value": 1e-6},
        ODD,
    ),
    NetworkCase("d2_convnext_tiny"),
    NetworkCase("d2_convnext_tiny", "symmetrized, not square", SYMMETRIZED, (64, 96)),
)


def known_networks() -> list[str]:
    """All registered networks that promise something."""
    return [name for name in timm.list_models() if twin_of(name)]


def choose(patterns: list[str]) -> list[str]:
    """The networks that match names or globs, in the order of the patterns, each once.

    Raises:
        UserError: if a pattern matches none, or names an ordinary network.
    """
    known = known_networks()
    chosen: dict[str, None] = {}
    for pattern in patterns:
        matches = [name for name in known if fnmatchcase(name, pattern)]
        if not matches and timm.is_model(pattern):
            raise UserError(f"{pattern!r} is an ordinary network: nothing is promised of it")
        if not matches:
            raise UserError(f"no network matches {pattern!r}{suggest(pattern, known)}")
        chosen.update(dict.fromkeys(matches))
    return list(chosen)
