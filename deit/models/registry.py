"""Registering rows of size tables with timm."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from torch import nn

from deit.errors import one_line

# our name: timm's, whose hosted weights are those of the same ordinary network; the first are of
# DeiT III (arXiv:2204.07118)
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
# both families of names are in use for the initial LayerScale; timm says `init_values`
LAYER_SCALE_NAMES = ("init_scale", "layer_scale_init_value", "init_values")


def default_cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    """timm's description of a network: its inputs as in DeiT III, and where hosted weights are."""
    hosted = get_pretrained_cfg(HOSTED[name]) if name in HOSTED else None
    return {
        "url": "",
        **({} if hosted is None else {"hf_hub_id": hosted.hf_hub_id}),
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2502.05169",
        **kwargs,
    }


def register_sizes(
    module: str,
    model_cls: Callable[..., nn.Module],
    sizes: Mapping[str, Mapping[str, Any]],
    *,
    cfg: Mapping[str, Any],
    filter_fn: Callable | None = None,
    out_indices: Any = 3,
) -> None:
    """Make each row of `sizes` a timm model of its name.

    Args:
        module: `__name__` of the calling module; the entry points become its functions.
        model_cls: called with the row's arguments, overridden by the user's. The initial LayerScale
            is its `init_scale`, and users may give it under any of `LAYER_SCALE_NAMES`.
        sizes: name to arguments.
        cfg: fields of the pretrained configuration that differ from `default_cfg`.
        filter_fn: translates a checkpoint for a given model, by timm's convention.
        out_indices: what `features_only=True` returns by default.
    """
    namespace: Any = sys.modules[module]
    cfgs = getattr(namespace, "default_cfgs", {})
    namespace.default_cfgs = {
        **cfgs,
        **generate_default_cfgs({name: default_cfg(name, **cfg) for name in sizes}),
    }
    for name, row in sizes.items():
        entry = _entry_point(name, model_cls, row, filter_fn, out_indices)
        entry.__module__ = module
        setattr(namespace, name, register_model(entry))


def _entry_point(name, model_cls, row, filter_fn, out_indices) -> Callable:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        given = [key for key in LAYER_SCALE_NAMES if key in kwargs]
        if len(given) > 1:
            raise TypeError(f"{name} got the initial LayerScale more than once: {', '.join(given)}")
        if given:
            kwargs["init_scale"] = kwargs.pop(given[0])
        hosted = pretrained and not _has_weights(kwargs)
        if hosted and name not in HOSTED:
            raise RuntimeError(
                f"no hosted weights exist for {name}: deit.load('weights.pth') builds the network "
                "of a file with its trained weights (ema=True: their average); timm's own "
                "checkpoint_path and pretrained_cfg_overlay=dict(file=...) take the average where "
                "a file has one"
            )
        try:
            return build_model_with_cfg(
                model_cls,
                name,
                pretrained,
                pretrained_filter_fn=filter_fn,
                feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
                **{**row, **kwargs},
            )
        except (OSError, RuntimeError) as error:  # the hub's errors are OSErrors
            if not hosted or "size mismatch" in str(error):
                raise
            raise RuntimeError(
                f"the weights of {name}, {HOSTED[name]} on Hugging Face, could not be had "
                f"({one_line(error)[:160]}): download the file where there is a network, and pass "
                "pretrained_cfg_overlay=dict(file='model.safetensors') with pretrained=True"
            ) from None

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}: {', '.join(f'{k}={v}' for k, v in row.items())}."
    return create


def _has_weights(kwargs: Mapping[str, Any]) -> bool:
    """Whether the caller says where weights are, in either of timm's ways."""
    sources = ("file", "url", "hf_hub_id", "state_dict", "source")
    cfgs = (kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    # a dict, timm's data class, or a name
    fields = [cfg if isinstance(cfg, dict) else getattr(cfg, "__dict__", {}) for cfg in cfgs]
    return any(own.get(source) for own in fields for source in sources)
