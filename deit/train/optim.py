"""Optimizers: which parameters decay, how fast each layer learns, and which implementation runs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import Lamb, create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn
from torch.optim import Optimizer

from deit.errors import UserError, one_line, suggest

# timm's names of the optimizers of torch that have a fused form.
_FUSED = frozenset({"adam", "adamw"})
# Embeddings are positions in feature space, not maps: shrinking them has no meaning. The parts of
# an equivariant embedding are pos_embed.0, pos_embed.1, ...
_TOKENS = frozenset({"pos_embed", "cls_token", "dist_token", "reg_token"})


def peak_lr(args: Namespace, images: int) -> float:
    """The learning rate after the warm-up, for updates of so many images; `--lr` is for 512."""
    return args.lr if args.unscale_lr else args.lr * images / 512


def decays(name: str, parameter: torch.Tensor, exempt: Collection[str] = ()) -> bool:
    """Whether weight decay applies to a parameter.

    It does not to vectors (also those stored with leading axes of length 1, such as (1, 1, C)),
    biases, tokens and position embeddings, and what `exempt`, the network's own
    `no_weight_decay()`, lists by name, by wildcard, or by the name of a module that holds it.
    """
    is_vector = parameter.ndim <= 1 or (
        parameter.ndim > 2 and parameter.numel() == parameter.shape[-1]
    )
    parts = name.split(".")
    if is_vector or parts[-1] == "bias" or not _TOKENS.isdisjoint(parts):
        return False
    return not any(
        fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for pattern in exempt
    )


def decays_as_compiled(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applied to a parameter in the published runs that were compiled.

    They looked parameters up under the names that compilation gives (`_orig_mod.pos_embed`), which
    no list of exceptions knows: all but vectors and biases decayed, position embeddings and class
    tokens too, and the LayerScale of ordinary ConvNeXts, which they store with four axes.
    """
    leaf = name.split(".")[-1]
    return leaf == "gamma" or (parameter.ndim > 1 and leaf != "bias")


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, as_compiled: bool = False
) -> list[dict[str, Any]]:
    """The trainable parameters in groups of equal weight decay and learning rate.

    A group has `weight_decay` (0 where `decays` says no), `wd_scale` (1 or 0, for schedules), and
    `lr_scale`, which timm's schedulers multiply the learning rate by: layer_decay^k for the k-th
    layer from the output, layers being those of the network's `group_matcher`.

    Args:
        as_compiled: decide by `decays_as_compiled` in place of `decays`.

    Raises:
        UserError: nothing is trainable, or a layer decay for a network without `group_matcher`.
    """
    kind = type(model).__name__
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    layers: dict[str, int] = {}
    if layer_decay != 1:
        if not hasattr(model, "group_matcher"):
            raise UserError(
                f"{kind} does not say what its layers are (no group_matcher): layer decay must be 1"
            )
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values(), default=0)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = decays_as_compiled(name, p) if as_compiled else decays(name, p, exempt)
            groups.setdefault((last - layers.get(name, last), decay), []).append(p)
    if not groups:
        raise UserError(f"{kind} has no trainable parameter")
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decay else 0.0,
            "wd_scale": float(decay),
            "lr_scale": layer_decay**from_output,
        }
        for (from_output, decay), parameters in groups.items()
    ]


def freeze_shift(model: nn.Module) -> str:
    """Keep the shifts of equivariant ResMLPs (`beta_sym`, `beta_asym`) at what they are.

    The published networks hold them, and never add them: they stayed at zero.

    Returns:
        A remark for the user, if the network has none.
    """
    shifts = [p for name, p in model.named_parameters() if name.split(".")[-1].startswith("beta_")]
    for parameter in shifts:
        parameter.requires_grad_(False)
    return "" if shifts else "--freeze-shift has no effect: this network has no such shift"


def build_optimizer(model: nn.Module, args: Namespace, lr: float) -> tuple[Optimizer, list[str]]:
    """The optimizer that the options `args` ask for, timm's `args.opt`.

    Adam and AdamW are torch's fused ones where the network is on a GPU. `fusedlamb` is apex's where
    that is installed and the network is on a GPU and not sharded, else timm's `lamb`, which makes
    the same updates. What an optimizer has no use for (betas, eps, momentum) is ignored.

    Returns:
        The optimizer, and remarks for the user.

    Raises:
        UserError: an unknown optimizer, or one that does not take these settings.
    """
    groups = parameter_groups(model, args.weight_decay, args.layer_decay, args.decay_as_compiled)
    settings = {"lr": lr, "weight_decay": args.weight_decay, "eps": args.opt_eps}
    name, known = args.opt.lower(), list_optimizers()
    inner = name.removeprefix("lookahead_")
    if inner not in known:
        raise UserError(f"unknown optimizer {args.opt!r}{suggest(name, known)}")
    if args.opt_betas is not None:
        info, count = get_optimizer_info(inner), len(args.opt_betas)
        if info.has_betas and count != info.num_betas:
            raise UserError(f"optimizer {args.opt!r} takes {info.num_betas} betas, got {count}")
        settings["betas"] = tuple(args.opt_betas)
    if inner in _FUSED and _on_gpu(groups):
        settings["fused"] = True
    try:
        if name == "fusedlamb":
            return _fused_lamb(groups, settings)
        return create_optimizer_v2(groups, opt=name, momentum=args.momentum, **settings), []
    except Exception as error:  # timm asserts, imports and raises whatever the optimizer does
        raise UserError(f"optimizer {args.opt!r} cannot be built: {one_line(error)}") from error


def _fused_lamb(
    groups: list[dict[str, Any]], settings: dict[str, Any]
) -> tuple[Optimizer, list[str]]:
    """apex's FusedLAMB, or timm's Lamb where its kernels cannot have the parameters; which."""
    why = "that needs whole weights on a GPU"
    if _on_one_gpu(groups):
        try:
            from apex.optimizers import FusedLAMB

            return FusedLAMB(groups, **settings), ["--opt fusedlamb is apex's FusedLAMB"]
        except (ImportError, RuntimeError) as error:  # absent, or built without its extensions
            why = one_line(error)
    note = f"--opt fusedlamb is timm's Lamb, with the updates of apex's FusedLAMB: {why}"
    return Lamb(groups, **settings), [note]


def _on_gpu(groups: list[dict[str, Any]]) -> bool:
    return groups[0]["params"][0].is_cuda


def _on_one_gpu(groups: list[dict[str, Any]]) -> bool:
    """Whether apex's kernels can have the parameters: on a GPU, and not sharded."""
    return _on_gpu(groups) and not hasattr(groups[0]["params"][0], "to_local")
