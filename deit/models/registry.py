"""Registering rows of size tables with timm."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from deit.errors import one_line
from deit.models.hub import HOSTED, hosted_cfg

try:
    from timm.models._input import update_model_input_size as record_input_size
except ImportError:  # older timm rebuilds no network from its record

    def record_input_size(  # type: ignore[misc]
        model: nn.Module, img_size: Any, **model_args: Any
    ) -> None:
        """Nothing to record."""


__all__ = ["record_input_size", "register_sizes"]

# both families of names are in use for the initial LayerScale; timm says `init_values`
LAYER_SCALE_NAMES = ("init_scale", "layer_scale_init_value", "init_values")


def default_cfg(img_size: int = 224, **kwargs: Any) -> dict[str, Any]:
    """timm's description of a network's inputs, as in DeiT III; without hosted weights."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, img_size, img_size),
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
    layer_scale: str = "init_scale",
    filter_fn: Callable | None = None,
    out_indices: Any = 3,
) -> None:
    """Make each row of `sizes` a timm model of its name.

    Args:
        module: `__name__` of the calling module; the entry points become its functions.
        model_cls: called with the row's arguments, overridden by the user's.
        sizes: name to arguments.
        cfg: fields of the pretrained configuration that differ from `default_cfg`.
        layer_scale: the argument of `model_cls` for the initial LayerScale; users may give it
            under any of `LAYER_SCALE_NAMES`.
        filter_fn: translates a checkpoint for a given model, by timm's convention.
        out_indices: what `features_only=True` returns by default.
    """
    namespace: Any = sys.modules[module]
    cfgs = getattr(namespace, "default_cfgs", {})
    namespace.default_cfgs = {
        **cfgs,
        **generate_default_cfgs({name: default_cfg(**cfg, **hosted_cfg(name)) for name in sizes}),
    }
    for name, row in sizes.items():
        entry = _entry_point(name, model_cls, row, layer_scale, filter_fn, out_indices)
        entry.__module__ = module
        setattr(namespace, name, register_model(entry))


def _entry_point(name, model_cls, row, layer_scale, filter_fn, out_indices) -> Callable:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        given = [key for key in LAYER_SCALE_NAMES if key in kwargs]
        if len(given) > 1:
            raise TypeError(f"{name} got the initial LayerScale more than once: {', '.join(given)}")
        if given:
            kwargs[layer_scale] = kwargs.pop(given[0])
        elsewhere = _has_weights(kwargs)
        if pretrained and not elsewhere and name not in HOSTED:
            raise RuntimeError(
                f"no hosted weights exist for {name}: deit.load('weights.pth') builds the network "
                "of a file with its trained weights (ema=True: their average); timm's own "
                "checkpoint_path and pretrained_cfg_overlay=dict(file=...) take the average where "
                "a file has one"
            )

        def build() -> nn.Module:
            return build_model_with_cfg(
                model_cls,
                name,
                pretrained,
                pretrained_filter_fn=filter_fn,
                feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
                **{**row, **kwargs},
            )

        if not pretrained or elsewhere:
            return build()
        try:
            return build()
        except (OSError, RuntimeError) as error:  # the hub's errors are OSErrors
            if isinstance(error, RuntimeError) and "size mismatch" in str(error):
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
    for cfg in (kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")):
        get = cfg.get if isinstance(cfg, dict) else lambda key, cfg=cfg: getattr(cfg, key, None)
        if cfg is not None and not isinstance(cfg, str) and any(get(key) for key in sources):
            return True
    return False
