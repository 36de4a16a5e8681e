"""From the options of a command line to networks, data sets and loaders."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.data.random_erasing import RandomErasing
from timm.layers import to_2tuple
from torch import nn

import deit.models  # noqa: F401 - registers the networks
from deit.data import (
    DeviceLoader,
    ImageDataset,
    ResumableBatchSampler,
    build_dataset,
    eval_transform,
    evaluation_batches,
    match_classes,
    names_of_outputs,
    read_class_map,
    train_transform,
)
from deit.data.transforms import Transform
from deit.errors import UserError, one_line, suggest
from deit.models.inputs import check_image_size
from deit.train.args import get_parser
from deit.train.checkpoint import Checkpoint
from deit.train.distributed import DistContext

# Arguments of a network: the options that they come from, and the values that say nothing.
_ARGUMENTS = {
    "patch_size": ("patch_size", None),
    "drop_rate": ("drop", 0.0),
    "drop_path_rate": ("drop_path", 0.0),
    # Off is what networks without equivariant features are anyway.
    "use_symmetrized_asym_feats": ("symmetrized_asym_feats", False),
    "use_attn_mixer": ("attn_mixer", False),
    "use_fused_attn": ("fused_attn", None),
    "layer_scale_init_value": ("layer_scale_init_value", None),
    "head_init_scale": ("head_init_scale", 1.0),
}
# Options of one family that published command lines of the others carry too, without effect.
_HARMLESS = ("use_fused_attn", "use_symmetrized_asym_feats", "use_attn_mixer")


def model_arguments(args: Namespace, num_classes: int) -> dict[str, Any]:
    """The keyword arguments for `timm.create_model`: those that say something."""
    given = {
        name: getattr(args, option)
        for name, (option, silent) in _ARGUMENTS.items()
        if getattr(args, option) != silent
    }
    others = dict(args.model_kwargs or ())
    return {"num_classes": num_classes, "img_size": args.input_size} | given | others


def build_model(args: Namespace, num_classes: int) -> tuple[nn.Module, list[str]]:
    """The network `args.model`, in training mode on the CPU.

    Returns:
        The network, and remarks for the user.

    Raises:
        UserError: an unknown name, an option that this network does not have, or values of which
            it cannot be built.
    """
    name = args.model
    check_known(name)
    kwargs = model_arguments(args, num_classes)
    try:
        if not 0 <= kwargs.get("drop_path_rate", 0) <= 1:
            raise ValueError("drop_path_rate is a probability, from 0 to 1")
        model, unknown = create_network(name, kwargs)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"model {name!r} cannot be built: {one_line(error)}") from error
    notes = [note for key in unknown if (note := _about_unknown(key, kwargs[key], args))]
    check_image_size(model, args.input_size, "--input-size", name)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise UserError(f"model {name!r} has no --grad-checkpointing") from error
    return model, notes


def check_known(name: str, what: str = "model") -> None:
    """Raise UserError unless timm or this package has a network of that name."""
    if not timm.is_model(name):
        raise UserError(f"unknown {what} {name!r}{suggest(name, timm.list_models())}")


def create_network(name: str, kwargs: Mapping[str, Any]) -> tuple[nn.Module, list[str]]:
    """`timm.create_model` with what the network knows of `kwargs`; the names of the others."""
    known, unknown = dict(kwargs), []
    while True:
        try:
            return timm.create_model(name, **known), unknown
        except TypeError as error:
            # The latter are arguments of a base class that a network gives itself.
            wrong = r"(?:unexpected keyword argument|multiple values for .*argument) '(\w+)'"
            found = re.search(wrong, str(error))
            if found is None or found.group(1) not in known:
                raise
            unknown.append(found.group(1))
            del known[unknown[-1]]


def _about_unknown(name: str, value: Any, args: Namespace) -> str:
    """A note on an argument that the network lacks; an error if leaving it out does harm."""
    if name in dict(args.model_kwargs or ()):
        raise UserError(f"model {args.model!r} has no argument {name!r} (--model-kwargs)")
    if name == "img_size":  # convolutional networks take any size
        return ""
    option, _ = _ARGUMENTS[name]
    flag = f"--{option.replace('_', '-')}"
    if value == get_parser().get_default(option):
        return f"{args.model} has no {flag}; its default, {value}, is not applied"
    if name in _HARMLESS:
        return f"{args.model} has no {flag}: it has no effect"
    raise UserError(f"model {args.model!r} has no option {flag} ({name}): omit it")


def build_train_dataset(args: Namespace) -> ImageDataset:
    """The training split with its random transforms, or with those of evaluation (--no-aug)."""
    transform = train_transform_of(args) if args.aug else _eval_transform(args)
    return _build_dataset(args, "train", args.data_set, args.data_path, transform)


def build_val_dataset(args: Namespace) -> ImageDataset:
    """The validation split with the deterministic transform."""
    name, root = args.data_set, args.data_path
    if args.eval_data_path:
        name, root = "image_folder", args.eval_data_path
    return _build_dataset(args, "val", name, root, _eval_transform(args))


def _build_dataset(
    args: Namespace, split: str, name: str, root: str, transform: Transform
) -> ImageDataset:
    return build_dataset(
        split,
        name=name,
        root=root or None,
        transform=transform,
        inat_category=args.inat_category,
        zip_archive=args.zip_dataloader,
        download=args.download,
    )


def train_transform_of(args: Namespace) -> Transform:
    """The random transform of training images.

    Raises:
        UserError: an augmentation that is not understood.
    """
    return train_transform(
        args.input_size,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        three_augment=args.ThreeAugment,
        simple_crop=args.src,
        hflip=args.hflip,
        mean=mean_and_std(args)[0],
    )


def mean_and_std(args: Namespace) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What images are normalised by, a number for each of red, green, blue."""
    if args.imagenet_default_mean_and_std:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD


def _eval_transform(args: Namespace) -> Transform:
    return eval_transform(args.input_size, crop_ratio=args.eval_crop_ratio, warp=warps(args))


def warps(args: Namespace) -> bool:
    """Whether evaluation resizes whole images to a square, in place of a crop."""
    smallest = min(to_2tuple(args.input_size))
    return args.eval_warp_from is not None and smallest >= args.eval_warp_from


def number_of_classes(args: Namespace, data: ImageDataset) -> int:
    """The outputs that a new network needs.

    Raises:
        UserError: --nb-classes is too small for the data.
    """
    if args.nb_classes is None:
        return data.num_classes
    if args.nb_classes < data.num_classes:
        raise UserError(
            f"--nb-classes {args.nb_classes} is too few: the data have {data.num_classes} classes"
        )
    return args.nb_classes


def label(
    args: Namespace,
    sets: Sequence[ImageDataset],
    checkpoint: Checkpoint | None,
    outputs: int | None,
    *,
    strict: bool = True,
) -> list[str]:
    """Number the classes of the data as --class-map says, or as `checkpoint` has them.

    Args:
        outputs: of the network; None if the classes decide.
        strict: raise if nothing says what the outputs stand for; else they keep the data's order.

    Returns:
        Remarks for the user.
    """
    if args.class_map:
        names, origin = read_class_map(args.class_map), f"--class-map {args.class_map}"
    elif checkpoint is None:
        return []
    else:
        classes, saved, source = sets[0].class_names, checkpoint.class_names, checkpoint.source
        wanted = outputs or len(saved or classes)
        try:
            names, origin = names_of_outputs(classes, wanted, source=source, saved=saved)
        except UserError:
            if strict:
                raise
            return [f"{source} does not say which output is which class: taken in the data's order"]
    return [match_classes(data, names, outputs or len(names), origin=origin) for data in sets][-1]


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


def build_train_stream(
    args: Namespace, dataset: ImageDataset, processes: DistContext, epoch: int, step: int
) -> DeviceLoader:
    """The batches of this process, from update `step` of `epoch` to the end of the training."""
    sampler = ResumableBatchSampler(
        len(dataset),
        batch_size=args.batch_size,
        epochs=args.epochs,
        start_epoch=epoch,
        start_step=step * args.update_freq,
        seed=args.seed,
        world_size=processes.world_size,
        rank=processes.rank,
        repeats=3 if args.repeated_aug else 1,
    )
    if args.ThreeAugment or not args.reprob:  # without erasing, as published
        return _loader(args, dataset, sampler, processes)
    splits = sampler.repeats if args.resplit else 0
    erasing = RandomErasing(
        args.reprob, mode=args.remode, max_count=args.recount, num_splits=splits, device="cpu"
    )
    return _loader(args, dataset, sampler, processes, erasing)


def build_val_loader(
    args: Namespace, dataset: ImageDataset, processes: DistContext
) -> DeviceLoader:
    """The validation batches of this process; all of them without --dist-eval."""
    place = {"world_size": processes.world_size, "rank": processes.rank} if args.dist_eval else {}
    batches = evaluation_batches(len(dataset), args.batch_size, **place)
    return _loader(args, dataset, batches, processes)


def _loader(
    args: Namespace,
    dataset: ImageDataset,
    batches: ResumableBatchSampler | list[list[int]],
    processes: DistContext,
    erasing: RandomErasing | None = None,
) -> DeviceLoader:
    mean, std = mean_and_std(args)
    return DeviceLoader(
        dataset,
        batches,
        device=processes.device,
        num_workers=workers(args),
        pin_memory=args.pin_mem,
        mean=mean,
        std=std,
        erasing=erasing,
    )


def workers(args: Namespace) -> int:
    """`--num-workers`, but no more than the cores of this process: they would only wait."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux; not what others share the machine
    return min(args.num_workers, len(affinity(0)) if affinity else os.cpu_count() or 1)


def updates_per_epoch(args: Namespace, images: int, processes: int) -> int:
    """Optimizer updates in an epoch of `images`. UserError if they do not fill one batch."""
    updates = images // (args.batch_size * processes) // args.update_freq
    if updates == 0:
        batch = args.batch_size * processes * args.update_freq
        raise UserError(
            f"the training set has {images} images, fewer than one global batch of {batch} "
            f"(--batch-size {args.batch_size} x {processes} processes x "
            f"--update-freq {args.update_freq}): use a smaller one"
        )
    return updates


def set_precision(args: Namespace, device: torch.device) -> None:
    """Settings of the process: precision of float32, threads, and what makes fixed shapes fast."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if args.high_precision_matmul else "highest")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = not args.full_float32
    if args.activation_memory_budget is not None:
        from torch._functorch import config

        config.activation_memory_budget = args.activation_memory_budget
