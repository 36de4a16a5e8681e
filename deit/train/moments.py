"""Which parameter a saved optimizer state belongs to.

An optimizer's state dict knows parameters by their position alone, and the position depends on how
parameters are grouped. Our checkpoints hold the names in that order (`parameters`). Those of the
published code do not: there the order is that of the keys of `model`, in which modules were
registered, split into parameters that decay and that do not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from deit.errors import UserError
from deit.models.published import own_name, same_but_for_ones
from deit.train.checkpoint import plain_name

# What the command line and the device decide about a parameter group. Everything else in it (step
# counts, estimated distances, ...) is state of the optimizer.
_FROM_THIS_RUN = frozenset(
    {"params", "param_names", "lr", "initial_lr", "lr_scale", "weight_decay", "wd_scale", "betas"}
    | {"eps", "momentum", "max_grad_norm", "foreach", "fused", "capturable", "differentiable"}
)
# Other entries (factors of moments, step counts) have shapes of their own.
_SHAPED_LIKE_WEIGHTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
# What the published networks except from weight decay: their names as lists have them, or as
# parts of equivariant embeddings.
_EXEMPT = (
    frozenset(),
    frozenset({"pos_embed", "cls_token", "dist_token"}),
    frozenset({"pos_embed.0", "pos_embed.1", "cls_token.0"}),
)


def refusal(source: str, what: str, same: str) -> UserError:
    """The error of a state that cannot be gone on with."""
    return UserError(
        f"the optimizer state in {source!r} {what}: use the same {same}, or go on with the weights "
        "alone by --resume-weights-only"
    )


def optimizer_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The names of the optimizer's parameters, in the order of its positions."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def same_optimizer(one: str, other: str) -> bool:
    """Whether two values of --opt are one optimizer, perhaps in two implementations."""
    return one == other or {one, other} == {"lamb", "fusedlamb"}


def decayed_names(names: Sequence[str], groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The parameters of an optimizer that decay; `names` in the order of its positions."""
    decays = [bool(group["weight_decay"]) for group in groups for _ in group["params"]]
    return [name for name, decay in zip(names, decays, strict=True) if decay]


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state dict, with the state of the generator that AdaHessian draws from."""
    state = optimizer.state_dict()
    generator = getattr(_inner(optimizer), "generator", None)
    if isinstance(generator, torch.Generator):
        state["generator"] = generator.get_state()
    return state


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside timm's Lookahead."""
    return getattr(optimizer, "_base_optimizer", optimizer)


def published_names(
    model: nn.Module, state: Mapping[str, Tensor], saved: Mapping[str, Any], source: str
) -> list[str]:
    """Our names of the parameters in an optimizer state that the published code saved.

    Published groups are those of timm 1.0.12 or of ConvNeXt's authors: what decays, and what does
    not, or all in one without any decay. A parameter decays if it has more than one axis, is no
    bias and not on the network's list, which knows no `_orig_mod.`, the prefix that compilation
    gives. Index tensors and fixed zeros, which the published networks hold as frozen parameters,
    were not given to the optimizer.

    Args:
        state: the checkpoint's `model` as it is in the file: prefixes and order matter.
        saved: the checkpoint's `optimizer`.

    Raises:
        UserError: no such grouping has the sizes and shapes of `saved`.
    """
    own, groups = dict(model.named_parameters()), saved["param_groups"]
    entries = [(raw, own_name(model, plain_name(raw)), value) for raw, value in state.items()]
    entries = [entry for entry in entries if entry[1] in own]
    states = [saved["state"].get(index, {}) for group in groups for index in group["params"]]
    # Frozen here, they may have been trained there, and the other way round.
    for kept in (entries, [entry for entry in entries if own[entry[1]].requires_grad]):
        for exempt in _EXEMPT:
            parts: dict[bool, list[tuple[str, Tensor]]] = {False: [], True: []}
            for raw, name, value in kept:
                decays = value.ndim > 1 and not raw.endswith(".bias") and raw not in exempt
                parts[decays or len(groups) == 1].append((name, value))
            ordered = [parts[bool(g["weight_decay"]) or len(groups) == 1] for g in groups]
            found = [entry for part in ordered for entry in part]
            if [len(part) for part in ordered] == [len(g["params"]) for g in groups] and all(
                _has_shape(moments, value.shape)
                for moments, (_, value) in zip(states, found, strict=True)
            ):
                return [name for name, _ in found]
    what = "cannot be told apart, as no grouping of the published code fits this network"
    raise refusal(source, what, "model")


def _has_shape(moments: Mapping[str, Any], shape: Sequence[int]) -> bool:
    """Whether the state of a parameter fits its shape. Some optimizers keep single numbers."""
    return all(
        same_but_for_ones(value.shape, shape)
        for key, value in moments.items()
        if key in _SHAPED_LIKE_WEIGHTS and isinstance(value, Tensor) and value.ndim > 0
    )


def load_optimizer(
    model: nn.Module,
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    source: str,
    names: Sequence[str] | None = None,
) -> list[str]:
    """Load a whole optimizer state dict into that of `model`, sharded as its parameters are.

    Args:
        names: of the parameters in `saved`, in its order, None if it is that of `optimizer`.

    Returns:
        The parameters that `saved` does not have.

    Raises:
        UserError: it belongs to another optimizer or to other parameters.
    """
    own, own_groups = optimizer_names(model, optimizer), optimizer.state_dict()["param_groups"]
    groups = saved["param_groups"]
    positions = [index for group in groups for index in group["params"]]
    same_groups = [len(g["params"]) for g in groups] == [len(g["params"]) for g in own_groups]
    names = own if names is None and same_groups else names
    if names is None or len(names) != len(positions):
        same = "model, --opt, --layer-decay and --weight-decay"
        raise refusal(source, "has other parameter groups than this run", same)
    if saved["state"] and not _same_kind(optimizer, saved):
        raise refusal(source, "is of another optimizer than this run's", "--opt")
    index_of = dict(zip(names, positions, strict=True))
    state = {}
    for position, name in enumerate(own):
        moments = saved["state"].get(index_of.get(name))
        if moments is not None:
            param = model.get_parameter(name)
            if not _has_shape(moments, param.shape):
                what = "is of tensors of other shapes than this run's"
                raise refusal(source, what, "model and --opt")
            state[position] = {key: _placed(key, v, param) for key, v in moments.items()}
    group_of = {index: group for group in groups for index in group["params"]}
    for group in own_groups:  # each goes on with the counts of its first parameter
        theirs = group_of.get(index_of.get(own[group["params"][0]]), groups[0])
        kept = {key: value for key, value in theirs.items() if key not in _FROM_THIS_RUN}
        group.update(copy.deepcopy(kept))  # a step count may be a tensor, which each group counts
        # timm's count, of which apex's kernel takes the number
        if type(optimizer).__module__.startswith("apex.") and "step" in group:
            group["step"] = int(group["step"])
    optimizer.load_state_dict({"state": state, "param_groups": own_groups})
    if "generator" in saved and hasattr(inner := _inner(optimizer), "generator"):
        inner.generator = torch.Generator(next(model.parameters()).device)
        inner.generator.set_state(saved["generator"].cpu())
    return [name for name in own if name not in index_of]


def _same_kind(optimizer: Optimizer, saved: Mapping[str, Any]) -> bool:
    """Whether what was saved has the decays of moments and the step counts that are needed."""
    own, inner = optimizer.param_groups[0], _inner(optimizer)
    needed = {"betas", "momentum", "step"} & own.keys()
    if type(inner).__name__ in ("Lamb", "FusedLAMB"):  # they make the count at their first step
        needed.add("step")
    counted = isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))
    return needed <= saved["param_groups"][0].keys() and (
        not counted or all("step" in state for state in saved["state"].values())
    )


def _placed(key: str, value: Any, param: Tensor) -> Any:
    """A value of the saved state, in the shape and sharding of its parameter if it is a moment."""
    if not isinstance(value, Tensor):
        return value
    if key in _SHAPED_LIKE_WEIGHTS and value.ndim > 0:
        value = value.reshape(param.shape)
    if isinstance(param, DTensor) and value.shape == param.shape:
        return distribute_tensor(value.to(param.device), param.device_mesh, param.placements)
    return value.to(param.device, copy=True) if value.shape == param.shape else value.clone()
