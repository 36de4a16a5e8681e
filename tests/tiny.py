"""One small network of each registered family, for tests of what all of them must do."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

import deit.models  # noqa: F401, registers the names
from deit.equivariance import randomize_

VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
RESMLP = dict(img_size=32, patch_size=8, embed_dim=32, depth=4)
ISOTROPIC = dict(patch_size=8, embed_dim=32, depth=4, layer_scale_init_value=0.1)
HIERARCHICAL = dict(patch_size=2, depths=(1, 1, 2, 1), dims=(16, 32, 48, 64))

# the prefix of a family's names: a name with it, arguments that make a small network
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "d2_deit": ("d2_deit_small_patch16_LS", VIT),
    "hybrid_deit": ("hybrid_deit_small_patch16_LS", VIT),
    "d2_inv_early_deit": ("d2_inv_early_deit_small_patch16_LS", VIT),
    "deit": ("deit_small_patch16_LS", VIT),
    "resmlp_equi_d2": ("resmlp_equi_d2_12", RESMLP),
    "resmlp": ("resmlp_12", RESMLP),
    "d2_convnext_isotropic": ("d2_convnext_isotropic_small", ISOTROPIC),
    "convnext_isotropic": ("convnext_isotropic_small", ISOTROPIC),
    "d2_convnext": ("d2_convnext_tiny", HIERARCHICAL),
}
NAMES = list(FAMILIES)
# those with equivariant layers, all but the ordinary twins
EQUIVARIANT = [name for name in NAMES if "d2" in name or "hybrid" in name]
TRANSFORMERS = [name for name in NAMES if "deit" in name]
# those made by deit.models.vit.VisionTransformer
EQUIVARIANT_TRANSFORMERS = [name for name in TRANSFORMERS if name != "deit"]


def create(family: str, **kwargs: Any) -> nn.Module:
    """A small network of a family, in evaluation mode, with ten classes."""
    name, tiny = FAMILIES[family]
    return timm.create_model(name, **{"num_classes": 10, **tiny, **kwargs}).eval()


def create_random(family: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    """The same in float64 with all parameters random: no term is hidden by an initial zero."""
    return randomize_(create(family, **kwargs).double(), seed)


def images(
    count: int = 2, size: tuple[int, int] = (32, 32), seed: int = 0, dtype: Any = torch.float64
) -> Tensor:
    """Random images, (count, 3, *size)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *size, generator=generator, dtype=torch.float64).to(dtype)


def x32(count: int = 2, size: tuple[int, int] = (32, 32)) -> Tensor:
    """The same in float32."""
    return images(count, size, dtype=torch.float32)
