"""Weights of a checkpoint into a network: as they are, or adapted to another size or classes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import get_type_hints

from torch import Tensor, nn

from deit.errors import UserError, one_line
from deit.models.published import adapt_state
from deit.train.checkpoint import Checkpoint, counted, some

__all__ = ["LoadReport", "classifier_names", "freeze_all_but_attention", "load_weights"]

Filter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


@dataclass
class LoadReport:
    """What became of a checkpoint's weights; the lists hold state-dict keys.

    Attributes:
        loaded: tensors that were loaded.
        adapted: those among them that were changed to fit, such as position embeddings.
        reinitialised: the classifier's, if it has other classes or features: left at random.
        missing: tensors of the network that the checkpoint lacks: left at random.
        unexpected: tensors of the checkpoint that the network has no use for.
    """

    loaded: int = 0
    adapted: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line that names what was not simply loaded."""
        text = f"{self.loaded} tensors loaded"
        for names, verb in (
            (self.adapted, "resampled"),
            (self.reinitialised, "initialised anew"),
            (self.missing, "not in the checkpoint and left at random"),
            (self.unexpected, "of the checkpoint not used"),
        ):
            if names:
                text += f", {len(names)} {verb} ({some(names)})"
        return text


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    ema: bool = False,
    adapt: bool = False,
    new_classes: bool = False,
    hint: str = "",
) -> LoadReport:
    """Load the trained weights of `checkpoint` into `model`, or with `ema` their average.

    Args:
        adapt: take weights for another resolution or other classes. The network's own
            `checkpoint_filter_fn` resamples what depends on the resolution; in equivariant
            networks it does so equivariantly. A classifier of another shape keeps its random
            initialisation. Without `adapt` every key must fit, by the published names or the
            network's own.
        new_classes: with `adapt`, leave the classifier at random even if it would fit.
        hint: what to add to the message if they do not fit.

    Raises:
        UserError: the weights are not there, are infinite or NaN, or do not fit: with `adapt` if
            a tensor other than the classifier's has another shape, or less than half of the
            network is in the checkpoint. Nothing has been loaded then.
    """
    source, state = checkpoint.source, adapt_state(checkpoint.state(ema), model)
    filter_fn = _filter_of(model) if adapt else None
    try:
        found = filter_fn(dict(state), model) if filter_fn else state
    except (KeyError, RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"{source!r} cannot be fitted: {one_line(error)}") from error
    own = model.state_dict()
    fitted = {n: v for n, v in found.items() if n in own and v.shape == own[n].shape}
    head = classifier_names(model) if adapt else set()
    report = LoadReport(unexpected=[name for name in found if name not in own])
    # A weight without its bias would be half a classifier.
    if new_classes or any(name in state and name not in fitted for name in head):
        report.reinitialised = sorted(head)
        fitted = {name: value for name, value in fitted.items() if name not in head}
    left = [name for name in own if name not in fitted and name not in report.reinitialised]
    report.missing = [name for name in left if name not in found]
    report.adapted = [n for n in fitted if n in state and fitted[n].shape != state[n].shape]
    report.loaded = len(fitted)
    wrong = {n: f"{_size(found[n])} and not {_size(own[n])}" for n in left if n in found}
    name, hint = type(model).__name__, f"; {hint}" if hint else ""
    problem = _misfit(report, wrong, len(own), name) if adapt else _inexact(report, wrong, name)
    if problem:
        if not adapt and checkpoint.model_name:
            problem += f"; it was saved from model {checkpoint.model_name!r}"
        raise UserError(f"checkpoint {source!r} {problem}{hint}")
    try:
        model.load_state_dict(fitted, strict=False)
    except (RuntimeError, ValueError) as error:  # a network's own checks, such as token order
        raise UserError(f"checkpoint {source!r} does not fit: {one_line(error)}{hint}") from error
    return report


def _inexact(report: LoadReport, wrong: Mapping[str, str], network: str) -> str:
    """What keeps weights from being those of exactly this network."""
    counts = (
        counted(report.missing, "missing key"),
        counted(report.unexpected, "unexpected key"),
        counted(list(wrong), "tensor", " of another shape"),
    )
    found = ", ".join(filter(None, counts))
    return f"does not fit this {network}: {found}" if found else ""


def _misfit(report: LoadReport, wrong: Mapping[str, str], tensors: int, network: str) -> str:
    """What keeps weights from being adapted to this network, which has so many `tensors`."""
    if wrong:
        shapes = some([f"{name} {shapes}" for name, shapes in wrong.items()])
        return (
            f"does not fit this {network}: {len(wrong)} of its tensors have another shape: {shapes}"
        )
    if report.loaded < (tensors - len(report.reinitialised)) / 2:
        others = f", and has {some(report.unexpected)}" if report.unexpected else ""
        return (
            f"is of another network than this {network}: it has {report.loaded} of its {tensors} "
            f"tensors, lacks {some(report.missing)}{others}"
        )
    return ""


def _size(tensor: Tensor) -> str:
    return "x".join(str(n) for n in tensor.shape) or "scalar"


def _filter_of(model: nn.Module) -> Filter | None:
    """timm's convention: the module that defines a network has a `checkpoint_filter_fn`.

    A module may define several networks; the annotation of the filter then says for which it is.
    """
    for cls in type(model).__mro__:
        function = getattr(sys.modules[cls.__module__], "checkpoint_filter_fn", None)
        if function is None:
            continue
        try:
            wanted = get_type_hints(function).get("model", nn.Module)
        except (NameError, TypeError):  # annotations that do not resolve say nothing
            wanted = nn.Module
        if isinstance(wanted, type) and isinstance(model, wanted):
            return function
    return None


def classifier_names(model: nn.Module) -> set[str]:
    """The state-dict keys of the final classifier, or of both where there are two."""
    if not hasattr(model, "get_classifier"):
        return set()
    found = model.get_classifier()
    heads = found if isinstance(found, (tuple, list)) else (found,)
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if any(module is head for head in heads)
        for key in module.state_dict()
    }


def freeze_all_but_attention(model: nn.Module) -> None:
    """Freeze all but attention, position embedding and classifier (arXiv:2203.09795).

    Attention is what lies in a module named `attn`: queries, keys, values and the projection
    after them; the norms and LayerScales around them are frozen, as are patch embedding, class
    token and MLPs. What the network itself holds fixed stays so.

    Raises:
        UserError: the network has no attention.
    """
    trained = classifier_names(model)
    attention = {name for name, _ in model.named_parameters() if "attn" in name.split(".")}
    if not attention:
        raise UserError(f"{type(model).__name__} has no attention layers: omit --attn-only")
    for name, parameter in model.named_parameters():
        if not (name in attention or name in trained or "pos_embed" in name.split(".")):
            parameter.requires_grad_(False)
