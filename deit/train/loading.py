"""A network as its checkpoint needs it: the options that it was trained with, then the weights.

Every command that takes a checkpoint asks the file what the command line does not say. Which of a
file's two sets of weights is meant is always explicit: the trained ones, or with `ema` their
average.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models import model_entrypoint
from torch import Tensor, nn

from deit.deploy.info import NetworkInfo
from deit.errors import UserError
from deit.layers import MirrorGrid
from deit.train.args import config_dict, parse_args
from deit.train.build import build_model, mean_and_std, warps
from deit.train.checkpoint import Checkpoint, entries_as_expected, read_checkpoint
from deit.train.distributed import DistContext
from deit.train.folder import LAST
from deit.train.moments import same_optimizer
from deit.train.weights import load_weights

# The options of deit/main.py that weights depend on, those that say how to prepare an image, and
# all that an evaluation depends on.
NETWORK = ("model", "input_size", "patch_size", "symmetrized_asym_feats", "attn_mixer",
           "layer_scale_init_value", "model_kwargs")  # fmt: skip
PREPARATION = ("eval_crop_ratio", "eval_warp_from", "imagenet_default_mean_and_std")
DATA = ("data_path", "eval_data_path", "data_set", "zip_dataloader", "inat_category",
        *PREPARATION)  # fmt: skip
# What may differ from the run that is gone on with, without changing what is trained.
_PLACE = frozenset(
    {"resume", "resume_weights_only", "output_dir", "overwrite", "start_epoch", "eval", "dist_eval"}
    | {"device", "threads", "num_workers", "pin_mem", "world_size", "dist_url", "log_interval"}
    | {"log_dir", "save_freq", "save_ckpt", "save_ckpt_num", "auto_resume", "wandb", "wandb_ckpt"}
    | {"project", "job_dir", "flop_eval", "kernels", "download", "dist_timeout"}
)

_TOKEN_ORDER = "patch_embed.flatten_and_permute.permutation"
# where the families keep their patch kernels, (C/2, 3, patch, half a patch)
_PATCHES = ("patch_embed.proj_sym.weight", "stem.proj_sym.weight",
            "downsample_layers.0.0.proj_sym.weight")  # fmt: skip


def load(
    source: str | Path,
    *,
    ema: bool = False,
    model: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The network of a checkpoint with its weights, built as it was trained.

    Args:
        source: a `.pth` or `.safetensors` file, an https:// address, or `hf-hub:owner/name`.
        ema: load the average of the weights in place of the trained weights themselves.
        model: the network's name, for files that do not say it.
        img_size: side, or (height, width), of the images if not those that it was trained on.
        num_classes: outputs; another number than the checkpoint's starts a new classifier.
        kwargs: further arguments of the network, in place of those that it was trained with.

    Returns:
        The network on the CPU, in evaluation mode. Its attribute `class_names` lists what its
        outputs stand for, in their order; None if the file does not say it.

    Raises:
        UserError: the file cannot be read, does not say which network it is, does not fit, or has
            weights that are infinite or NaN; `img_size` or `num_classes` is no number.
    """
    _check_numbers(img_size, num_classes)
    network, _ = build_as_trained(
        source, ema=ema, model=model, img_size=img_size, num_classes=num_classes, kwargs=kwargs
    )
    return network.eval()


def _check_numbers(img_size: Any, num_classes: Any) -> None:
    sides = to_2tuple(img_size)
    whole = all(isinstance(side, Integral) and side > 0 for side in sides)
    if img_size is not None and not (whole and len(sides) == 2):
        raise UserError(f"img_size {img_size!r} is neither a side in pixels nor (height, width)")
    if num_classes is not None and not (isinstance(num_classes, Integral) and num_classes >= 0):
        raise UserError(f"num_classes {num_classes!r} is no number of classes: 0 or more")


def build_as_trained(
    source: str | Path,
    *,
    ema: bool = False,
    model: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Namespace]:
    """`load` in training mode, which also returns the options that the network was built with."""
    checkpoint, args = read_checkpoint(source), parse_args([])
    args.model, args.model_kwargs = model, list((kwargs or {}).items())
    args.given = {"model"} if model else set()
    args.drop = args.drop_path = 0.0
    adopt(args, checkpoint, (*NETWORK, *PREPARATION), ema=ema)
    if args.model is None:
        raise UserError(
            f"{checkpoint.source!r} does not say which model it is: give its name (--model)"
        )
    trained_size = to_2tuple(args.input_size)
    args.input_size = args.input_size if img_size is None else img_size
    weight = classifier_weight(checkpoint.state(ema), args.model)
    outputs = 0 if weight is None else len(weight)
    wanted = outputs if num_classes is None else num_classes
    network, _ = build_model(args, wanted)
    own = classifier_weight(network.state_dict(), args.model)
    if weight is not None and own is not None and weight.shape[1] == 2 * own.shape[1]:
        args.symmetrized_asym_feats = True
        network, _ = build_model(args, wanted)
    other = wanted != outputs or to_2tuple(args.input_size) != trained_size
    load_weights(network, checkpoint, ema=ema, adapt=other)
    names = checkpoint.class_names
    network.class_names = names if names and wanted == outputs else None
    return network, args


def network_info(args: Namespace, class_names: Sequence[str] | None) -> NetworkInfo:
    """How to prepare images for a network that was trained with `args`, and its classes."""
    mean, std = mean_and_std(args)
    return NetworkInfo(
        args.model,
        to_2tuple(args.input_size),
        mean=mean,
        std=std,
        crop_ratio=args.eval_crop_ratio,
        warp=warps(args),
        class_names=None if class_names is None else tuple(class_names),
    )


@entries_as_expected
def adopt(
    args: Namespace, checkpoint: Checkpoint, names: Iterable[str], *, ema: bool = False
) -> list[str]:
    """Take from a checkpoint those of the options `names` that the command line does not give.

    What the checkpoint's `args` do not say, the names and shapes of its weights may. Of
    `model_kwargs` each one counts by itself. If the command line names another model than the
    checkpoint, nothing is taken.

    Args:
        args: from `parse_args`; changed in place.
        ema: the average is what is to be loaded.

    Returns:
        What was taken, and where the command line and the checkpoint differ, for the user.
    """
    source, trained, now = checkpoint.source, checkpoint.options, config_dict(args)
    given, model = set(args.given), trained.get("model") or args.model
    if "model" in given and model != args.model:
        return [f"--model {args.model}, but {source} was saved from {model}"]
    said = {name: value for name, value in trained.items() if value is not None}
    known = _inferred(checkpoint.state(ema), model) | said
    if given & {"data_path", "eval_data_path", "data_set"}:
        # what the file says of the data belongs to its own folder
        given |= {"data_path", "eval_data_path", "zip_dataloader"}
        given |= {"data_set"} if known.get("data_set") == "SAMPLE" else set()
    taken, differing = [], []
    for name in names:
        ours = now[name]
        if name == "model_kwargs":
            ours, theirs = dict(ours or ()), dict(said.get(name, ()))
            words = [f"{key}={value}" for key, value in theirs.items() if key not in ours]
            taken += [f"--model-kwargs {' '.join(words)}"] if words else []
            differing += [
                _difference(f"--model-kwargs {key}", value, theirs[key])
                for key, value in ours.items()
                if theirs.get(key, value) != value
            ]
            args.model_kwargs = list((theirs | dict(args.model_kwargs or ())).items())
        elif name in given:
            if name not in DATA and trained.get(name, ours) != ours:
                differing.append(_difference(_flag(name), ours, trained[name]))
        elif known.get(name, ours) != ours:
            if ours is not None and isinstance(ours, str) != isinstance(known[name], str):
                raise TypeError(f"{name} is {known[name]!r}")
            setattr(args, name, known[name])
            taken += [_spelled(name, known[name])] if name in said else []
    notes = [f"taken from {source}: {' '.join(taken)}"] if taken else []
    return notes + ([f"other than in {source}: {'; '.join(differing)}"] if differing else [])


def changed_options(checkpoint: Checkpoint, args: Namespace) -> list[str]:
    """What of the run that is gone on with is another one now: a sentence for each option."""
    before, now = checkpoint.options, config_dict(args)
    return [
        _difference(_flag(name), value, before[name])
        for name, value in now.items()
        if name in before
        and name not in _PLACE
        and _shown(value) != _shown(before[name])
        # What nobody asked for, then and now, was settled from the network.
        and (name in args.given or before[name] is not None)
        and not (name == "opt" and same_optimizer(value, before[name]))
    ]


def find_checkpoints(
    args: Namespace, processes: DistContext
) -> tuple[Checkpoint | None, Checkpoint | None]:
    """What `--resume` names, None for a fresh start, and what that begins with by `--finetune`."""
    source = args.resume
    if source == "auto":
        last = Path(args.output_dir) / LAST
        # a link that leads nowhere is no fresh start, but a checkpoint that cannot be read
        source = str(last) if os.path.lexists(last) else ""
    with processes.main_first():
        if source:
            return read_checkpoint(source), None
        if args.finetune:
            return None, read_checkpoint(
                args.finetune, key=args.model_key, prefix=args.model_prefix
            )
    return None, None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _spelled(name: str, value: Any) -> str:
    """An option as it stands on a command line."""
    if isinstance(value, bool):
        return _flag(name if value else f"no_{name}")
    return f"{_flag(name)} {value}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "not given" if value in (None, "", []) else f"{value}"


def _difference(flag: str, ours: Any, theirs: Any) -> str:
    return f"{flag} is {_shown(ours)}, it was {_shown(theirs)}"


def classifier_weight(state: Mapping[str, Tensor], name: str) -> Tensor | None:
    """That (K, C) in the weights of the model `name`, None without one."""
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    found = (config.classifier if config is not None else None) or "head"
    return state.get(f"{found if isinstance(found, str) else found[0]}.weight")


def _inferred(state: Mapping[str, Tensor], name: str | None) -> dict[str, Any]:
    """The options that the names and shapes of weights tell."""
    found: dict[str, Any] = {}
    if name is None or not timm.is_model(name):
        return found
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.input_size:
        found["input_size"] = config.input_size[-1]
    for key in _PATCHES:
        if key in state:
            found["patch_size"] = state[key].shape[-2]
    if _TOKEN_ORDER in state and _PATCHES[0] in state:
        grid = MirrorGrid.from_permutation(state[_TOKEN_ORDER])
        height, width = (n * found["patch_size"] for n in (grid.height, grid.width))
        found["input_size"] = height if height == width else (height, width)
    if any(key.endswith("attn.attn_mixer") for key in state):
        found["attn_mixer"] = True
    if "convnext" in name and model_entrypoint(name).__module__.startswith("deit."):
        scaled = any(".gamma" in key for key in state)
        found["layer_scale_init_value"] = 1e-6 if scaled else 0.0
    return found
