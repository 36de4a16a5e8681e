"""The networks that every tool is tried on, one of each family and narrower than in `tiny`."""

from __future__ import annotations

from typing import Any

import tiny
from torch import nn

SHALLOW = dict(embed_dim=16, depth=2)
WHOLE = dict(use_symmetrized_asym_feats=True)  # the head sees all that the last block gives
EXPLICIT = dict(SHALLOW, **WHOLE, use_fused_attn=False, reg_tokens=1)
DROP = dict(drop_path_rate=0.2, drop_rate=0.1)
RATES = dict(DROP, proj_drop_rate=0.1)

# id: a family, arguments that make it smaller, rates of what is random in training
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vit": ("d2_deit", SHALLOW, dict(RATES, pos_drop_rate=0.1)),
    "vit, explicit attention": ("d2_deit", EXPLICIT, dict(RATES, attn_drop_rate=0.1)),
    "hybrid": ("hybrid_deit", SHALLOW, RATES),
    "invariant-early": ("d2_inv_early_deit", SHALLOW, RATES),
    "resmlp": ("resmlp_equi_d2", dict(SHALLOW, **WHOLE), RATES),
    "isotropic convnext": ("d2_convnext_isotropic", dict(SHALLOW, **WHOLE), DROP),
    "hierarchical convnext": (
        "d2_convnext",
        dict(WHOLE, patch_size=4, depths=(1, 2), dims=(8, 16)),
        DROP,
    ),
}
LINEARS = ("vit", "resmlp", "isotropic convnext")
# the ordinary twins whose classes are at least in part ours
ORDINARY = {
    "ordinary vit": ("deit", SHALLOW, RATES),
    "ordinary resmlp": ("resmlp", SHALLOW, RATES),
    "ordinary isotropic convnext": ("convnext_isotropic", SHALLOW, DROP),
}


def create(network: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    """One in float32, with all parameters random, in evaluation mode."""
    family, small, _ = (NETWORKS | ORDINARY)[network]
    return tiny.create_random(family, seed, **{**small, **kwargs}).float()


def create_noisy(network: str) -> nn.Module:
    """The same with dropout and stochastic depth, in training mode."""
    return create(network, **(NETWORKS | ORDINARY)[network][2]).train()
