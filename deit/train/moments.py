"""Which parameter a saved optimizer state belongs to.

An optimizer's state dict knows parameters by their position alone, and the position depends on how
parameters are grouped. Our checkpoints hold the names in that order (`parameters`). Those of the
published code do not: there the order is that of the keys of `model`, in which modules were
registered, split into parameters that decay and that do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deit.errors import UserError
from deit.models.published import own_name
from deit.train.checkpoint import strip_prefixes
from deit.train.distributed import like_sharded

# What the command line and the device decide about a parameter group. Everything else in it (step
# counts, estimated distances, ...) is state of the optimizer.
_FROM_THIS_RUN = frozenset(
    {"params", "param_names", "lr", "initial_lr", "lr_scale", "weight_decay", "wd_scale", "betas"}
    | {"eps", "momentum", "max_grad_norm", "foreach", "fused", "capturable", "differentiable"}
)
# Other entries (factors of moments, step counts) have shapes of their own.
_SHAPED_LIKE_WEIGHTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
REMEDY = "or go on with the weights alone by --resume-weights-only"
# What the published networks except from weight decay: their names as lists have them, or as
# parts of equivariant embeddings.
_EXEMPT = (
    frozenset(),
    frozenset({"pos_embed", "cls_token", "dist_token"}),
    frozenset({"pos_embed.0", "pos_embed.1", "cls_token.0"}),
)


def optimizer_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The names of the optimizer's parameters, in the order of its positions."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state dict, with the state of the generator that AdaHessian draws from."""
    state = optimizer.state_dict()
    inner = _inner(optimizer)
    if isinstance(getattr(inner, "generator", None), torch.Generator):
        state["generator"] = inner.generator.get_state()
    return state


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside timm's Lookahead."""
    return getattr(optimizer, "_base_optimizer", optimizer)


def published_names(
    model: nn.Module, state: Mapping[str, Tensor], saved: Mapping[str, Any]
) -> list[str] | None:
    """Our names of the parameters in an optimizer state that the published code saved.

    Published groups are those of timm 1.0.12 (first what does not decay) or of ConvNeXt's authors
    (first the kind that comes first). A parameter decays if it has more than one axis, is no bias
    and not on the network's list, which knows no `_orig_mod.`, the prefix that compilation gives.
    Index tensors and fixed zeros, which the published networks hold as frozen parameters, were not
    given to the optimizer.

    Args:
        state: the checkpoint's `model` as it is in the file: prefixes and order matter.
        saved: the checkpoint's `optimizer`.

    Returns:
        None if no such grouping has the sizes and shapes of `saved`.
    """
    own = dict(model.named_parameters())
    stripped = strip_prefixes(state)
    entries = [
        (raw, own_name(model, name), value)
        for (raw, value), name in zip(state.items(), stripped, strict=True)
        if own_name(model, name) in own
    ]
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    # Frozen here, they may have been trained there, and the other way round.
    for kept in (entries, [entry for entry in entries if own[entry[1]].requires_grad]):
        for exempt in _EXEMPT:
            decays = [
                value.ndim > 1 and not raw.endswith(".bias") and raw not in exempt
                for raw, _, value in kept
            ]
            split = [[e for e, d in zip(kept, decays, strict=True) if d == kind] for kind in (0, 1)]
            for groups in ([kept], *permutations([part for part in split if part])):
                if [len(group) for group in groups] == sizes and _fits(groups, saved):
                    return [name for group in groups for _, name, _ in group]
    return None


def _fits(groups: Sequence[Sequence[tuple[str, str, Tensor]]], saved: Mapping[str, Any]) -> bool:
    """Whether all moments have the shapes of the parameters at their positions, as far as it
    matters: axes of length 1 do not."""
    positions = [index for group in saved["param_groups"] for index in group["params"]]
    shapes = [value.shape for group in groups for _, _, value in group]
    return all(
        _without_ones(saved["state"][index][key].shape) == _without_ones(shape)
        for index, shape in zip(positions, shapes, strict=True)
        for key in _SHAPED_LIKE_WEIGHTS
        if key in saved["state"].get(index, ()) and saved["state"][index][key].ndim > 0
    )


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def load_optimizer(
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    source: str,
    order: Sequence[int | None] | None = None,
) -> list[int]:
    """Load a whole optimizer state dict into `optimizer`, sharded as its parameters are.

    Args:
        order: for each position in `saved` the position in `optimizer`, None for a parameter that
            this one does not have. None if they are the same.

    Returns:
        The positions in `optimizer` for which `saved` has no parameter.

    Raises:
        UserError: it belongs to another optimizer or to other parameters.
    """
    own_groups = optimizer.state_dict()["param_groups"]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    saved_groups = saved["param_groups"]
    sizes = [len(group["params"]) for group in saved_groups]
    if order is None:
        if sizes != [len(group["params"]) for group in own_groups]:
            raise UserError(
                f"the optimizer in {source!r} has other parameter groups than this run: use the "
                f"same model, --opt, --layer-decay and --weight-decay, {REMEDY}"
            )
        order = range(len(params))
    if len(order) != sum(sizes):
        raise UserError(
            f"the optimizer in {source!r} has {sum(sizes)} parameters, not {len(order)}: use the "
            f"same model and --opt, {REMEDY}"
        )
    if saved["state"] and not _same_kind(optimizer, own_groups[0], saved):
        raise UserError(
            f"the optimizer state in {source!r} is of another optimizer than this run's: use the "
            f"same --opt, {REMEDY}"
        )
    state: dict[int, dict[str, Any]] = {}
    came_from: dict[int, int] = {}
    positions = [(i, n) for n, group in enumerate(saved_groups) for i in group["params"]]
    for (index, group), position in zip(positions, order, strict=True):
        if position is None:
            continue
        came_from[position] = group
        if index in saved["state"]:
            state[position] = {
                key: _place(key, value, params[position], source)
                for key, value in saved["state"][index].items()
            }
    groups = []
    for own in own_groups:
        sources = sorted({came_from[i] for i in own["params"] if i in came_from})
        theirs = [saved_groups[n] for n in sources] or saved_groups
        groups.append(own | _group_state(theirs, optimizer, source))
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    inner = _inner(optimizer)
    if "generator" in saved and hasattr(inner, "generator"):
        inner.generator = torch.Generator(params[0].device)
        inner.generator.set_state(saved["generator"].cpu())
    return [i for i in range(len(params)) if i not in came_from]


def _same_kind(optimizer: Optimizer, own: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Whether what was saved has the decays of moments and the step counts that are needed."""
    group, inner = saved["param_groups"][0], _inner(optimizer)
    needed = [key for key in ("betas", "momentum", "step") if key in own]
    if type(inner).__name__ in ("Lamb", "FusedLAMB"):  # they make the count at their first step
        needed.append("step")
    if not all(key in group for key in needed):
        return False
    counted = isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))
    return not counted or all("step" in state for state in saved["state"].values())


def _group_state(
    groups: Sequence[Mapping[str, Any]], optimizer: Optimizer, source: str
) -> dict[str, Any]:
    """What the optimizer itself keeps in a group, from the saved groups that make it up."""
    state = {k: v for k, v in groups[0].items() if k not in _FROM_THIS_RUN}
    for group in groups[1:]:
        for key, value in state.items():
            if not _equal(value, group.get(key)):
                raise UserError(
                    f"the optimizer in {source!r} has groups of different {key!r}, which are one "
                    f"in this run: use the same --weight-decay and --layer-decay, {REMEDY}"
                )
    if type(optimizer).__module__.startswith("apex.") and isinstance(state.get("step"), Tensor):
        state["step"] = int(state["step"])  # an argument of its kernel
    return state


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def _place(key: str, value: Any, param: Tensor, source: str) -> Any:
    """A value of the saved state, in the shape and sharding of its parameter if it is a moment."""
    if not isinstance(value, Tensor):
        return value
    # Some optimizers keep one number for a whole tensor.
    if key in _SHAPED_LIKE_WEIGHTS and value.ndim > 0 and value.shape != param.shape:
        if _without_ones(value.shape) != _without_ones(param.shape):
            raise UserError(
                f"the optimizer state in {source!r} is of tensors of other shapes than this "
                f"run's: use the same model and --opt, {REMEDY}"
            )
        value = value.reshape(param.shape)
    return like_sharded(value, param) if value.shape == param.shape else value.clone()


def positions_of(names: Sequence[str], wanted: Sequence[str]) -> list[int | None]:
    """Where each of `names` stands in `wanted`, None if it does not."""
    where = {name: position for position, name in enumerate(wanted)}
    return [where.get(name) for name in names]
