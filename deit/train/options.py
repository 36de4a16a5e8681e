"""The options of training and evaluation, grouped by effect; `deit/train/args.py` parses them.

Every option may be written with dashes or underscores and shortened to a unique prefix.
"""

from __future__ import annotations

import argparse
import re
from argparse import ArgumentParser
from typing import Any

from deit.cli import CommandLine, OptionGroup, add_compile, add_kernels, key_value, number

__all__ = ["get_parser"]

SCHEDULES = ("cosine", "tanh", "poly", "step", "plateau", "constant")

COUNT = number(int, low=1)
NATURAL = number(int, low=0)
NON_NEGATIVE = number(float, low=0)
POSITIVE = number(float, above=0)
FRACTION = number(float, low=0, high=1)

_EPILOG = """\
examples:
  python deit/main.py --model d2_deit_tiny_patch16_LS --input-size 32 --patch-size 4 --epochs 5
      train on the bundled sample, on whatever device is there
  python deit/main.py --model d2_deit_small_patch16_LS --data-path IMAGENET --output-dir runs/s
      train on a folder with train/ and val/; the same command with --resume auto goes on
  python deit/main.py --model d2_deit_small_patch16_LS --data-path IMAGENET --resume FILE --eval
      evaluate a checkpoint
  torchrun --nproc-per-node 4 deit/main.py ...
      the same on four devices; --batch-size is per process

--batch-size and --batch_size are the same option, and --batch is enough.
"""

# fmt: off
# The option tables: one option is its line (flags, type, default, unit) and its effect beneath.
DATA_SETS = ("IMNET", "IMNETZIP", "CIFAR", "CIFAR10", "CIFAR100", "INAT", "INAT19", "FASHION",
             "SAMPLE", "image_folder")
INAT_RANKS = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


def device_name(text: str) -> str:
    if text != "auto" and not re.fullmatch(r"(cpu|mps|cuda|xpu)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, cpu, cuda, cuda:N, mps")
    return text


def _group(parser: ArgumentParser, title: str, about: str | None = None) -> tuple[Any, Any]:
    """`add` and `switch` of a new `OptionGroup`."""
    group = OptionGroup(parser, title, about)
    return group.add, group.switch


def _add_run(parser: ArgumentParser) -> None:
    add, switch = _group(parser, "run")
    add("--published", str, None, "SCRIPT",
        "take for all options that are not given what the published script does: deit (ViT, "
        "ResMLP) or convnext (default: the defaults shown here)", choices=("deit", "convnext"))
    add("--batch-size", COUNT, 64, "N",
        "images per process and step; the global batch is this x processes x --update-freq")
    add("--epochs", COUNT, 300, "N", "length of the training, warm-up included")
    add("--seed", number(int, 0, 10**18), 0, "N",
        "seed of initialisation, data order, augmentation, dropout and stochastic depth")
    add("--device", device_name, "auto", "NAME",
        "auto (cuda if there is one, else cpu), cpu, cuda, cuda:N or mps")
    add("--output-dir", str, "", "DIR",
        "folder for checkpoints, logs and curves, made if absent (default: save nothing)")
    switch("--overwrite",
           "start afresh in an --output-dir that holds a training, and remove that one")
    add("--resume", str, "", "SOURCE",
        "checkpoint to go on from, or to evaluate: a file, 'auto' (the last in --output-dir, if "
        "there is one), an https:// address, or hf-hub:OWNER/NAME (default: start afresh)")
    switch("--resume-weights-only",
           "take from that checkpoint the weights, their average and the epoch, not the "
           "optimizer's state")
    switch("--auto-resume", "--resume auto, where there is an --output-dir and no --resume")
    add("--start-epoch", NATURAL, 0, "N",
        "first epoch, counted from 0; a resumed checkpoint brings its own")
    switch("--eval", "evaluate the network and stop; needs only the val/ part of the data")
    switch("--fold", "with --eval: evaluate the network folded for deployment (deit.deploy.fold)")
    switch("--flop-eval",
           "evaluate the mirrored images too: their accuracy, and how many get the same answer as "
           "their mirror image")
    switch("--dist-eval",
           "share the evaluation among the processes; without it each evaluates every image, with "
           "the same result", default=True)
    add("--eval-freq", COUNT, 1, "EPOCHS",
        "epochs between evaluations; the last epoch is always evaluated")
    switch("--disable-eval",
           "train without any evaluation; only the train/ part of the data is needed")
    switch("--save-ckpt", "write checkpoints into --output-dir", default=True)
    add("--save-freq --save-ckpt-freq", NATURAL, 0, "EPOCHS",
        "epochs between copies of the checkpoint that are kept, beside checkpoint.pth (the last) "
        "and best_checkpoint.pth; 0 for none")
    add("--save-ckpt-num", NATURAL, 0, "N",
        "how many of these copies stay, the last ones; 0 for all")
    add("--num-workers", NATURAL, 10, "N",
        "data loading processes per training process, at most its cores; 0 to load within it")
    switch("--pin-mem",
           "pass batches through page-locked memory, faster towards a GPU", default=True)


def _add_model(parser: ArgumentParser) -> None:
    add, switch = _group(parser, "model")
    add("--model", str, "d2_deit_small_patch16_LS", "NAME", "a network of this package or of timm")
    add("--input-size", COUNT, 224, "PIXELS",
        "side of the square images in training and evaluation")
    add("--patch-size", COUNT, None, "PIXELS",
        "side of the patches of the first layer (default: the network's own)")
    add("--nb-classes", COUNT, None, "N",
        "outputs of the network (default: the number of classes in the data)")
    add("--drop", FRACTION, 0.0, "RATE", "probability of dropout")
    add("--drop-path", FRACTION, 0.1, "RATE",
        "stochastic depth: probability that a sample skips a residual branch")
    switch("--symmetrized-asym-feats",
           "give the classifier the absolute values of the antisymmetric features too; "
           "equivariant networks only")
    switch("--attn-mixer",
           "learn the weights of symmetric and antisymmetric attention logits; equivariant ViTs "
           "only, not with --fused-attn")
    switch("--freeze-shift",
           "keep the shifts of equivariant ResMLPs at zero: the published runs stored them but "
           "never used them")
    switch("--fused-attn", "use PyTorch's fused attention kernels; ViTs only", default=None)
    add("--layer-scale-init-value", NON_NEGATIVE, None, "X",
        "initial value of LayerScale (default: the network's own)")
    add("--head-init-scale", NON_NEGATIVE, 1.0, "X",
        "factor on the initial weights of the classifier")
    add("--model-kwargs", key_value, None, "KEY=VALUE",
        "other arguments of the network, for instance embed_dim=96 depth=4 num_heads=3 (default: "
        "none)", nargs="+", action="extend")

    add, switch = _group(parser, "average",
                         "An exponential moving average (EMA) of the weights, kept beside them.")
    switch("--model-ema", "keep the average", default=True)
    add("--model-ema-decay", FRACTION, 0.99996, "X",
        "share of the old average that remains at an update")
    switch("--model-ema-force-cpu", "hold the average in host memory: saves GPU memory, takes time")
    switch("--model-ema-eval",
           "evaluate the average in place of the weights, and choose the best by it; 'both' after "
           "it evaluates both, and keeps the best of each (best_checkpoint_ema.pth), as "
           "ConvNeXt's script", words=("both",))


def _add_speed(parser: ArgumentParser) -> None:
    speed = OptionGroup(parser, "speed")
    add, switch = speed.add, speed.switch
    switch("--use-amp", "automatic mixed precision, on a GPU", default=True)
    add("--amp-dtype", str, "auto", None,
        "the lower precision: auto is bfloat16 where the device has it, else float16; float16 "
        "scales the loss", choices=("auto", "bfloat16", "float16"))
    add_compile(speed, "compile the network by torch.compile; the first step then takes minutes")
    add("--activation-memory-budget", FRACTION, None, "X",
        "share of the activations that --compile may keep for the backward pass; the others are "
        "computed again: saves memory, takes time (default: torch's choice)")
    switch("--high-precision-matmul",
           "let float32 matrix products use TF32, on a GPU: faster, rounded to 10 bits")
    switch("--full-float32",
           "use TF32 nowhere, on a GPU: not in convolutions either, where it is PyTorch's default")
    switch("--grad-checkpointing",
           "recompute activations in the backward pass: saves memory, takes time")
    add("--threads", COUNT, None, "N", "CPU threads per process (default: PyTorch's choice)")
    add_kernels(speed)


def _add_optimizer(parser: ArgumentParser) -> None:
    add, switch = _group(parser, "optimizer")
    add("--opt", str, "adamw", "NAME",
        "an optimizer of timm; fusedlamb is apex's where installed, else lamb, which makes the "
        "same updates")
    add("--opt-eps", NON_NEGATIVE, 1e-8, "X", "constant that keeps denominators away from zero")
    add("--opt-betas", FRACTION, None, "BETA",
        "decay of the running moments (default: the optimizer's own, 0.9 0.999 for adamw and "
        "lamb)", nargs="+")
    add("--clip-grad", POSITIVE, None, "NORM",
        "largest global norm of the gradient, clipped before the update (default: no clipping; "
        "lamb itself clips at 1)")
    add("--momentum", FRACTION, 0.9, "X", "momentum, in optimizers that have one")
    add("--weight-decay", NON_NEGATIVE, 0.05, "X",
        "weight decay; vectors, biases, tokens and position embeddings have none")
    add("--weight-decay-end", NON_NEGATIVE, None, "X",
        "weight decay at the end of the training, reached by a cosine over its updates (default: "
        "constant)")
    switch("--decay-as-compiled",
           "let position embeddings and class tokens decay and have LAMB's trust ratio, as in all "
           "published ViT runs, where compiled names hid them from the list of exceptions")
    add("--layer-decay", FRACTION, 1.0, "X",
        "factor on the learning rate for every layer further from the output")
    add("--update-freq", COUNT, 1, "STEPS", "steps whose gradients are accumulated for one update")


def _add_schedule(parser: ArgumentParser) -> None:
    add, switch = _group(parser, "schedule",
                         "The learning rate changes with every update; lengths are in epochs.")
    add("--sched", str, "cosine", None, "course of the learning rate", choices=SCHEDULES)
    add("--lr", NON_NEGATIVE, 5e-4, "LR",
        "learning rate for a global batch of 512, scaled in proportion to the actual one (see "
        "--unscale-lr)")
    switch("--unscale-lr", "take --lr as it is, whatever the global batch")
    add("--warmup-lr", NON_NEGATIVE, 1e-6, "LR",
        "learning rate that the linear warm-up starts from, never scaled")
    add("--warmup-epochs", NON_NEGATIVE, 5, "EPOCHS", "length of the warm-up, part of --epochs")
    add("--warmup-steps", number(int, low=-1), None, "UPDATES",
        "length of the warm-up in updates, in place of --warmup-epochs; -1 and 0 are as if not "
        "given (default: not given)")
    switch("--warmup-prefix",
           "start the course where the warm-up ends (ConvNeXt's way); without it the warm-up "
           "hides the beginning of the course (DeiT's)")
    add("--sched-as-published", str, None, None,
        "the published runs' course. deit: a step an epoch, one epoch late, so that two stay at "
        "--warmup-lr; convnext: a warm-up from 0, then the cosine (default: by the options above, "
        "at every update)", choices=("deit", "convnext"))
    add("--min-lr", NON_NEGATIVE, 1e-5, "LR",
        "learning rate that cosine, tanh, poly and plateau go down to, never scaled")
    add("--decay-epochs", POSITIVE, 30, "EPOCHS", "step: epochs between reductions")
    add("--decay-rate --dr", NON_NEGATIVE, 0.1, "X",
        "step, plateau: factor of one reduction; poly: the exponent")
    add("--patience-epochs", NATURAL, 10, "N",
        "plateau: evaluations in a row without a better top-1 that are tolerated")
    add("--cooldown-epochs", NATURAL, 10, "N",
        "plateau: evaluations after a reduction that do not count; other courses have no "
        "cooldown, and end with --epochs")
    add("--lr-noise", FRACTION, None, "FRACTION",
        "start, or start and end, of a noisy learning rate, as fractions of --epochs (default: no "
        "noise)", nargs="+")
    add("--lr-noise-pct", POSITIVE, 0.67, "X", "limit of the noise relative to the learning rate")
    add("--lr-noise-std", NON_NEGATIVE, 1.0, "X",
        "standard deviation of the noise, before that limit")


def _add_augmentation(parser: ArgumentParser) -> None:
    add, switch = _group(parser, "augmentation")
    switch("--aug",
           "change training images at random, as the options here say; without it they are "
           "resized and cropped as in evaluation (mixup and cutmix are apart from this)",
           default=True)
    add("--color-jitter", NON_NEGATIVE, 0.3, "X",
        "jitter of brightness, contrast and saturation; --aa replaces it, --ThreeAugment does not")
    add("--aa", str, "rand-m9-mstd0.5-inc1", "POLICY",
        "RandAugment or AutoAugment as timm spells them, or none; --ThreeAugment replaces it")
    switch("--ThreeAugment",
           "grayscale, solarize or blur each image (DeiT III); without random erasing, as "
           "published")
    switch("--src",
           "resize, then crop with 4 pixels of reflection padding, in place of the random resized "
           "crop")
    add("--hflip", FRACTION, 0.5, "PROB", "probability of mirroring a training image")
    add("--train-interpolation", str, "bicubic", None,
        "interpolation of the training crops", choices=("bicubic", "bilinear", "random"))
    switch("--repeated-aug",
           "use each drawn image 3 times, augmented differently, and so a third of the images in "
           "an epoch", default=True)
    add("--smoothing", number(float, low=0, high=0.999), 0.1, "X",
        "label smoothing; --bce-loss has none")
    add("--reprob", FRACTION, 0.25, "PROB", "probability of erasing a part of a training image")
    add("--remode", str, "pixel", None,
        "what is put there: noise in each pixel, one random colour, or black",
        choices=("pixel", "rand", "const"))
    add("--recount", COUNT, 1, "N", "largest number of parts erased")
    switch("--resplit", "erase nothing in the first of the copies that --repeated-aug makes")
    add("--mixup", NON_NEGATIVE, 0.8, "ALPHA",
        "parameter of mixup's Beta distribution, 0 for no mixup")
    add("--cutmix", NON_NEGATIVE, 1.0, "ALPHA",
        "parameter of cutmix's Beta distribution, 0 for no cutmix")
    add("--cutmix-minmax", FRACTION, None, ("MIN", "MAX"),
        "draw the side of the cut, relative to the image's, from this range and not by --cutmix "
        "(default: by --cutmix)", nargs=2)
    add("--mixup-prob", FRACTION, 1.0, "PROB", "probability that mixup or cutmix is applied")
    add("--mixup-switch-prob", FRACTION, 0.5, "PROB",
        "probability that it is cutmix, where both are on")
    add("--mixup-mode", str, "batch", None,
        "what shares one draw: the batch, a pair of images, or each image has its own",
        choices=("batch", "pair", "elem"))


def _add_loss(parser: ArgumentParser) -> None:
    add, switch = _group(parser, "loss", "Cross-entropy, unless one of these changes it.")
    switch("--bce-loss",
           "binary cross-entropy; every class that is mixed into an image counts as 1")
    switch("--cosub",
           "pass each image through two stochastic-depth sub-networks, with binary cross-entropy "
           "to the target and to each other; takes twice the time")
    add("--teacher-model", str, "regnety_160", "NAME",
        "network to distil, any of timm's or of this package")
    add("--teacher-path", str, "", "SOURCE",
        "the teacher's checkpoint, named as for --resume; its weights are taken, not their "
        "average (default: timm's weights)")
    add("--distillation-type", str, "none", None,
        "learn the teacher's probabilities (soft) or its decisions (hard)",
        choices=("none", "soft", "hard"))
    add("--distillation-alpha", FRACTION, 0.5, "X", "share of the distillation in the loss")
    add("--distillation-tau", POSITIVE, 1.0, "T", "temperature of soft distillation")

    add, switch = _group(parser, "fine-tune")
    add("--finetune", str, "", "SOURCE",
        "checkpoint, named as for --resume, whose weights (not their average) the training starts "
        "from, adapted to another resolution or other classes (default: random weights)")
    add("--model-key", str, "", "KEYS",
        "where in that file the weights are: KEY, or KEY|KEY for the first that is there "
        "(default: model, else state_dict, else the whole file)")
    add("--model-prefix", str, "", "PREFIX",
        "take the weights whose names begin so, without it (default: all)")
    switch("--attn-only",
           "train the attention layers, position embedding and classifier, freeze the rest")
    switch("--train-mode",
           "train with dropout and stochastic depth; without it in evaluation mode", default=True)


def _add_data(parser: ArgumentParser) -> None:
    add, switch = _group(parser, "data")
    add("--data-path", str, "", "DIR",
        "folder of the data set (default: the sample bundled with this package; with --eval that "
        "of the checkpoint's training)")
    add("--eval-data-path", str, "", "DIR",
        "folder of the test images, a folder a class (default: val/ in --data-path)")
    add("--data-set", str, "IMNET", None,
        "what is in --data-path. IMNET: train/ and val/ with a folder a class; IMNETZIP: with "
        "--zip-dataloader; CIFAR: CIFAR-100; FASHION: Fashion-MNIST; SAMPLE: the bundled sample, "
        "no path; image_folder: training images in a folder a class, the test images are in "
        "--eval-data-path", choices=DATA_SETS)
    switch("--zip-dataloader", "read train.zip and val.zip in place of the folders of IMNET")
    switch("--download", "fetch CIFAR or FASHION into --data-path if it is not there")
    add("--class-map", str, "", "FILE",
        "what the network's outputs stand for, as the data call it: a name a line, or JSON "
        '{"name": number} (default: as the checkpoint says, else as ImageNet-1K if the classes '
        "are its, else the data's order)")
    add("--inat-category", str, "name", None,
        "INAT, INAT19: the rank that makes the classes", choices=INAT_RANKS)
    add("--eval-crop-ratio --crop-pct", number(float, low=0.01, high=1), 1.0, "X",
        "side of the central crop in evaluation, relative to the resized image's")
    add("--eval-warp-from", COUNT, None, "PIXELS",
        "from this --input-size on evaluate without a crop, the whole image resized to a square; "
        "ConvNeXt's way, from 384 (default: never)")
    switch("--imagenet-default-mean-and-std",
           "normalise by ImageNet's mean and standard deviation; without it by 0.5, as Inception",
           default=True)

    add, switch = _group(parser, "distributed",
                         "torchrun, srun and submitit set the first two by themselves.")
    add("--world-size", COUNT, 1, "N", "number of processes")
    add("--dist-url", str, "env://", "URL", "where the processes meet")
    add("--dist-timeout", POSITIVE, 10.0, "MINUTES",
        "what waits longer for another process, because that one hangs, fails")
    switch("--fsdp",
           "shard weights, gradients and optimizer state over the processes, for networks too "
           "large for a device")

    add, switch = _group(parser, "logging")
    add("--log-interval", COUNT, 50, "STEPS",
        "steps between two progress lines, where the output is not a terminal")
    add("--log-dir", str, "", "DIR",
        "folder of the TensorBoard events (default: tensorboard/ in --output-dir)")
    switch("--wandb --enable-wandb", "log to Weights & Biases too")
    add("--project", str, "", "NAME",
        "project there (default: $WANDB_PROJECT, else mirror-equivariant-vision)")
    switch("--wandb-ckpt", "upload the last and the best checkpoint there at the end")

# fmt: on


def get_parser(**kwargs: Any) -> CommandLine:
    """The parser with every option; `kwargs` go to `ArgumentParser` (prog, usage, epilog, ...).

    A script with options of its own adds them to the returned parser (`OptionGroup` keeps their
    help in style) and hands it to `parse_args`.
    """
    settings: dict[str, Any] = {
        "description": "Train or evaluate an image classifier, mirror-equivariant or ordinary.",
        "usage": "%(prog)s [--model NAME] [--data-path DIR] [--output-dir DIR] [option ...]",
        "epilog": _EPILOG,
    }
    parser = CommandLine(**(settings | kwargs))
    _add_run(parser)
    _add_model(parser)
    _add_speed(parser)
    _add_optimizer(parser)
    _add_schedule(parser)
    _add_augmentation(parser)
    _add_loss(parser)
    _add_data(parser)
    return parser
