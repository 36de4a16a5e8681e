"""The command line of training and evaluation, grouped by effect.

args = parse_args()                     # for deit/main.py
parser = get_parser()                   # add options of your own to it, then
args = parse_args(argv, parser)
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deit.cli import read_toml
from deit.errors import UserError
from deit.train.options import get_parser

_SCRIPTS = Path(__file__).resolve().parents[1] / "recipes" / "scripts"  # a part of the package


def parse_args(
    argv: Sequence[str] | None = None, parser: ArgumentParser | None = None
) -> Namespace:
    """Parse, resolve and check a command line (default: this process's own).

    Raises:
        UserError: an unknown option, a value out of range, or options that exclude each other.
    """
    args = (parser or get_parser()).parse_args(argv)
    if args.published:
        for name, value in _published(args.published, args.model).items():
            if name not in args.given:
                setattr(args, name, value)
        if args.published == "convnext" and args.model_ema_eval and not args.eval:
            args.model_ema_eval = "both"  # what --model_ema_eval means there
    resolve(args)
    validate(args)
    return args


def resolve(args: Namespace) -> None:
    """Settle in place what options imply for each other."""
    if args.data_set == "IMNETZIP":
        args.data_set, args.zip_dataloader = "IMNET", True
    named = args.data_path or args.eval_data_path
    if not named and args.data_set == "IMNET" and not args.zip_dataloader:
        args.data_set = "SAMPLE"
    if args.data_set == "SAMPLE":
        args.data_path = ""
    # --overwrite wins over the published script's default
    wanted = args.auto_resume and ("auto_resume" in args.given or not args.overwrite)
    if wanted and args.output_dir and not args.resume:
        args.resume = "auto"
    if args.data_set == "CIFAR":
        args.data_set = "CIFAR100"
    if args.aa.lower() == "none":
        args.aa = ""
    if not args.aug:
        args.aa, args.ThreeAugment, args.src, args.repeated_aug = "", False, False, False
        args.color_jitter = args.hflip = args.reprob = 0.0
    if args.ThreeAugment and "reprob" not in args.given:
        args.reprob = 0.0
    if args.bce_loss:
        # Smoothed targets are all above zero: binarised, every class would be a target.
        args.smoothing = 0.0


def validate(args: Namespace) -> None:
    """Raise `UserError` for options that contradict each other; `args` have been resolved."""
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    low, high = args.cutmix_minmax or (0, 1)
    betas, noise = args.opt_betas or [0], args.lr_noise or ()
    data_set, zipped = args.data_set, args.zip_dataloader
    folders = data_set in ("IMNET", "image_folder") and not zipped
    conflicts: list[tuple[Any, str]] = [
        (args.attn_mixer and args.fused_attn,
         "--attn-mixer cannot be used with --fused-attn: fused attention computes its logits "
         "inside the kernel, where they cannot be mixed; drop one of the two"),
        (not args.eval and mixes and args.mixup_prob > 0 and args.batch_size % 2,
         f"--batch-size {args.batch_size} is odd, but mixup and cutmix work on pairs: use an even "
         "one, or --mixup 0 --cutmix 0"),
        (args.cosub and args.distillation_type != "none",
         "--cosub cannot be combined with --distillation-type; drop one of the two"),
        (args.full_float32 and args.high_precision_matmul,
         "--full-float32 forbids the TF32 of --high-precision-matmul: drop one"),
        (args.activation_memory_budget is not None and not args.compile,
         "--activation-memory-budget is for what --compile makes: add --compile"),
        (args.wandb_ckpt and not (args.wandb and args.output_dir and args.save_ckpt),
         "--wandb-ckpt uploads checkpoints: it needs --wandb and --output-dir"),
        (low >= high, f"--cutmix-minmax {low:g} {high:g}: the first must be the smaller one"),
        (max(betas) >= 1, f"--opt-betas {betas}: every beta must be less than 1"),
        (len(noise) > 2, f"--lr-noise takes a start and an end, got {len(noise)} numbers"),
        (args.warmup_prefix and args.warmup_epochs >= args.epochs,
         "--warmup-prefix leaves no epoch after the warm-up: --warmup-epochs "
         f"{args.warmup_epochs:g} of --epochs {args.epochs}"),
        (args.fold and not args.eval, "--fold is for --eval: a folded network is not trained"),
        (args.resume == "auto" and not args.output_dir,
         "--resume auto looks for the checkpoint in --output-dir, which is not given"),
        (args.resume == "auto" and args.overwrite,
         "--overwrite removes what --resume auto goes on with: drop one of the two"),
        (args.resume_weights_only and not args.resume,
         "--resume-weights-only needs --resume, the checkpoint that it is about"),
        ("num_classes" in dict(args.model_kwargs or ()),
         "--model-kwargs num_classes: give the number of outputs by --nb-classes"),
        (args.finetune == "auto",
         "--finetune needs the name of a checkpoint, 'auto' is for --resume"),
        (args.eval_data_path and not folders,
         "--eval-data-path is for --data-set IMNET or image_folder, in folders"),
        (data_set == "image_folder" and not (args.eval_data_path or args.disable_eval),
         "--data-set image_folder needs --eval-data-path, the folder of the test images, or "
         "--disable-eval"),
        (args.eval and args.disable_eval,
         "--eval evaluates, which --disable-eval forbids: drop one of the two"),
        (not (args.data_path or (args.eval and args.eval_data_path))
         and (data_set != "SAMPLE" or zipped),
         f"{'--zip-dataloader' if zipped else f'--data-set {data_set}'} needs --data-path, the "
         "folder that the data are in"),
        (zipped and data_set != "IMNET",
         f"--zip-dataloader reads IMNET's layout, not --data-set {data_set}"),
        (args.download and data_set not in ("CIFAR10", "CIFAR100", "FASHION"),
         f"--download fetches CIFAR and FASHION, not --data-set {data_set}"),
    ]  # fmt: skip
    for wrong, message in conflicts:
        if wrong:
            raise UserError(message)


def config_dict(args: Namespace | Mapping[str, Any]) -> dict[str, Any]:
    """The options as plain values that `json.dumps` takes, in alphabetical order.

    Paths become strings, tuples lists, nested namespaces dicts, anything else its `str`.
    """
    values = vars(args) if isinstance(args, Namespace) else dict(args)
    plain = lambda value: vars(value) if isinstance(value, Namespace) else str(value)  # noqa: E731
    return json.loads(json.dumps(values, default=plain, sort_keys=True))


def _published(script: str, model: str) -> dict[str, Any]:
    """Options of the published `script` (deit, convnext) that differ from deit/main.py's."""
    options = read_toml(_SCRIPTS / f"{script}.toml", "recipe")["options"]
    # its code stores the shifts of these networks, and never adds them
    return options | ({"freeze_shift": True} if model.startswith("resmlp_equi_") else {})
