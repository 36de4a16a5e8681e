"""Mixup and CutMix: timm's, built from the options of the command line, which are checked there."""

from __future__ import annotations

from collections.abc import Sequence

from timm.data import Mixup


def build_mixup(
    *,
    mixup: float,
    cutmix: float,
    cutmix_minmax: Sequence[float] | None,
    prob: float,
    switch_prob: float,
    mode: str,
    smoothing: float,
    num_classes: int,
) -> Mixup | None:
    """timm's `Mixup`, or None when neither mixup nor CutMix is on.

    It turns a batch (B, 3, H, W), B even, and class indices (B,) into mixed images and dense
    targets (B, num_classes), label smoothing included.
    """
    if not (mixup > 0 or cutmix > 0 or cutmix_minmax is not None):
        return None
    return Mixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        cutmix_minmax=cutmix_minmax,
        prob=prob,
        switch_prob=switch_prob,
        mode=mode,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )
