"""The tiny networks that every tool is tried on, one of each equivariant family."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

import deit.models  # noqa: F401, registers the names
from deit.equivariance import randomize_

SIZE, CLASSES = 16, 5
VIT = dict(img_size=SIZE, patch_size=4, embed_dim=16, depth=2, num_heads=2)
RESMLP = dict(img_size=SIZE, patch_size=4, embed_dim=16, depth=2)
ISOTROPIC = dict(patch_size=4, embed_dim=16, depth=2, layer_scale_init_value=0.1)
HIERARCHICAL = dict(patch_size=2, depths=(1, 2), dims=(8, 16), layer_scale_init_value=0.1)
WHOLE = dict(use_symmetrized_asym_feats=True)  # the head sees all that the last block gives
DROP = dict(drop_path_rate=0.2, drop_rate=0.1)
RATES = dict(proj_drop_rate=0.1, **DROP)

# id: a registered name, arguments that make it tiny, rates of what is random in training
Table = dict[str, tuple[str, dict[str, Any], dict[str, Any]]]
NETWORKS: Table = {
    "vit": ("d2_deit_small_patch16_LS", VIT, {**RATES, "pos_drop_rate": 0.1}),
    "vit, explicit attention": (
        "d2_deit_small_patch16_LS",
        dict(**VIT, **WHOLE, use_fused_attn=False, reg_tokens=1),
        {**RATES, "attn_drop_rate": 0.1},
    ),
    "hybrid": ("hybrid_deit_small_patch16_LS", VIT, RATES),
    "invariant-early": ("d2_inv_early_deit_small_patch16_LS", VIT, RATES),
    "resmlp": ("resmlp_equi_d2_12", dict(**RESMLP, **WHOLE), RATES),
    "isotropic convnext": ("d2_convnext_isotropic_small", dict(**ISOTROPIC, **WHOLE), DROP),
    "hierarchical convnext": ("d2_convnext_tiny", dict(**HIERARCHICAL, **WHOLE), DROP),
}
LINEARS = ("vit", "resmlp", "isotropic convnext")
# the ordinary twins whose classes are at least in part ours
ORDINARY: Table = {
    "ordinary vit": ("deit_small_patch16_LS", VIT, RATES),
    "ordinary resmlp": ("resmlp_12", RESMLP, RATES),
    "ordinary isotropic convnext": ("convnext_isotropic_small", ISOTROPIC, DROP),
}


def create(network: str, **kwargs: Any) -> nn.Module:
    """A tiny network in float32, with all parameters random, in evaluation mode."""
    name, tiny, _ = (NETWORKS | ORDINARY)[network]
    model = timm.create_model(name, num_classes=CLASSES, **{**tiny, **kwargs})
    return randomize_(model).eval()


def create_noisy(network: str) -> nn.Module:
    """The same with dropout and stochastic depth, in training mode."""
    return create(network, **(NETWORKS | ORDINARY)[network][2]).train()


def images(count: int = 4, seed: int = 0) -> Tensor:
    """Random images, (count, 3, SIZE, SIZE)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, SIZE, SIZE, generator=generator)


def inner_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The blocks of all equivariant linear maps, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("_sym", "_asym"))
    }


def equivariance_errors(model: nn.Module, x: Tensor) -> list[float]:
    """Relative errors under flopping: of the logits, if they are invariant, and of each feature
    map that says how many of its channels are symmetric."""
    errors = []
    with torch.no_grad():
        maps, mirrored = (
            model.forward_intermediates(z, intermediates_only=True) for z in (x, x.flip(-1))
        )
        for y, z, info in zip(maps, mirrored, model.feature_info, strict=True):
            if info["symmetric_channels"] is not None:
                sign = torch.ones(y.shape[1], 1, 1)
                sign[info["symmetric_channels"] :] = -1
                errors.append(((z.flip(-1) * sign - y).norm() / y.norm()).item())
        if model.feature_info[-1]["symmetric_channels"] is not None:
            y, z = model(x), model(x.flip(-1))
            errors.append(((y - z).norm() / y.norm()).item())
    assert errors
    return errors


def train(model: nn.Module, steps: int = 4, lr: float = 0.01, after: Any = None) -> list[float]:
    """Losses of a short training on one batch; `after` is called after each step."""
    x, y = images(8), torch.arange(8) % CLASSES
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if after is not None:
            after()
    return losses
