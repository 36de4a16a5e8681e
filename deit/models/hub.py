"""Hosted weights of ordinary networks: timm's entries of the same networks, with our keys."""

from __future__ import annotations

import re
from typing import Any

from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import checkpoint_filter_fn as timm_filter_fn
from torch import Tensor

__all__ = ["HOSTED", "hosted_cfg", "resmlp_filter_fn", "vit_filter_fn"]

# our name: timm's; the first networks are those of DeiT III (arXiv:2204.07118)
HOSTED = {
    "deit_small_patch16_LS": "deit3_small_patch16_224.fb_in1k",
    "deit_medium_patch16_LS": "deit3_medium_patch16_224.fb_in1k",
    "deit_base_patch16_LS": "deit3_base_patch16_224.fb_in1k",
    "deit_large_patch16_LS": "deit3_large_patch16_224.fb_in1k",
    "deit_huge_patch14_LS": "deit3_huge_patch14_224.fb_in1k",
    "resmlp_12": "resmlp_12_224.fb_in1k",
    "resmlp_24": "resmlp_24_224.fb_in1k",
    "resmlp_36": "resmlp_36_224.fb_in1k",
    "resmlpB_24": "resmlp_big_24_224.fb_in1k",
}

VIT_KEYS = ((r"\.ls([12])\.gamma$", r".gamma_\1"),)
RESMLP_KEYS = (
    (r"^stem\.", "patch_embed."),
    (r"\.ls([12])$", r".gamma_\1"),
    (r"\.linear_tokens\.", ".attn."),
    (r"\.mlp_channels\.", ".mlp."),
)


def hosted_cfg(name: str) -> dict[str, Any]:
    """The fields of a pretrained configuration that say where the weights of `name` are."""
    if name not in HOSTED:
        return {}
    cfg = get_pretrained_cfg(HOSTED[name])
    return {} if cfg is None else {"hf_hub_id": cfg.hf_hub_id}


def vit_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Published or timm's keys to ours; positions and patches of other sizes are resampled."""
    state_dict = state_dict.get("model", state_dict)
    return timm_filter_fn(_rename(state_dict, VIT_KEYS), model)


def resmlp_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Published or timm's keys and shapes to ours.

    Raises:
        ValueError: for weights of another patch size.
    """
    state_dict = _rename(state_dict.get("model", state_dict), RESMLP_KEYS)
    kernel, own = state_dict.get("patch_embed.proj.weight"), model.patch_embed.proj.weight
    if kernel is not None and kernel.shape[2:] != own.shape[2:]:
        raise ValueError(
            f"these weights are of patches of {kernel.shape[-1]} pixels, and the network has "
            f"patches of {own.shape[-1]}: create it with patch_size={kernel.shape[-1]}"
        )
    return {
        key: value.flatten() if key.endswith((".alpha", ".beta")) else value
        for key, value in state_dict.items()
    }


def _rename(state_dict: dict[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed
