"""Mixup and CutMix: timm's, built from the options of the command line, which are checked there."""

from __future__ import annotations

from argparse import Namespace

from timm.data import Mixup


def build_mixup(args: Namespace, num_classes: int) -> Mixup | None:
    """timm's `Mixup`, or None when neither mixup nor CutMix is on.

    It turns a batch (B, 3, H, W), B even, and class indices (B,) into mixed images and dense
    targets (B, num_classes), label smoothing included.
    """
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )
