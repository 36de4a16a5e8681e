"""Starting from trained weights: another resolution, other classes, attention layers only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor, nn

from deit.errors import UserError, one_line
from deit.models.published import adapt_state
from deit.train.checkpoint import model_state, read_checkpoint

Filter = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]

_SHOWN = 3


@dataclass
class FinetuneReport:
    """What became of a checkpoint; the lists hold state-dict keys.

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
                text += f", {len(names)} {verb} ({_some(names)})"
        return text


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def read_for_finetune(source: str, key: str = "", prefix: str = "") -> dict[str, Any]:
    """A checkpoint of whatever layout, with the weights that are meant as its `model`.

    Args:
        key: where they are (`model|module`: the first that is there), before the usual places.
        prefix: take only the weights whose names begin with it, and cut it off.

    Raises:
        UserError: the file cannot be read, or has no such weights.
    """
    keys = key.split("|") if key else []
    checkpoint = read_checkpoint(source, keys)
    if not (key or prefix):
        return checkpoint
    state = model_state(checkpoint, source=source, keys=keys)
    state = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if not state:
        raise UserError(f"{source!r} has no weights whose names begin with {prefix!r}")
    return checkpoint | {"model": state}


def load_for_finetune(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str | Path = "checkpoint",
    new_classes: bool = False,
) -> FinetuneReport:
    """Load weights that were trained at another resolution or for other classes.

    The network's own `checkpoint_filter_fn` resamples what depends on the resolution; in
    equivariant networks it does so equivariantly. A classifier of another shape keeps its random
    initialisation.

    Args:
        state: a state dict without the prefixes of compiled or distributed models.
        source: what to call the checkpoint in messages.
        new_classes: leave the classifier at random even if it would fit.

    Raises:
        UserError: a tensor other than the classifier's has another shape, or less than half of
            the network is in the checkpoint. Nothing has been loaded then.
    """
    state = adapt_state(state, model)
    translate = _filter_of(model)
    try:
        fitted = translate(dict(state), model) if translate else dict(state)
    except (KeyError, RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"{str(source)!r} cannot be fitted: {one_line(error)}") from error
    own = model.state_dict()
    head = classifier_names(model)
    report = FinetuneReport()
    wrong: list[str] = []
    for name in list(fitted):
        if name not in own:
            report.unexpected.append(name)
            del fitted[name]
        elif fitted[name].shape != own[name].shape:
            if name not in head:
                wrong.append(f"{name} {_size(fitted[name])} and not {_size(own[name])}")
            del fitted[name]
    # A weight without its bias would be half a classifier.
    if new_classes or any(name in state and name not in fitted for name in head):
        report.reinitialised = sorted(head)
        fitted = {name: value for name, value in fitted.items() if name not in head}
    report.missing = [n for n in own if n not in fitted and n not in report.reinitialised]
    report.loaded = len(fitted)
    report.adapted = [n for n in fitted if n in state and fitted[n].shape != state[n].shape]
    name = type(model).__name__
    if wrong:
        raise UserError(
            f"{str(source)!r} does not fit this {name}: {len(wrong)} of its tensors have another "
            f"shape: {_some(wrong)}"
        )
    if report.loaded < (len(own) - len(report.reinitialised)) / 2:
        raise UserError(
            f"{str(source)!r} is of another network than this {name}: it has {report.loaded} of "
            f"its {len(own)} tensors, lacks {_some(report.missing)}"
            + (f", and has {_some(report.unexpected)}" if report.unexpected else "")
        )
    try:
        model.load_state_dict(fitted, strict=False)
    except (RuntimeError, ValueError) as error:  # a network's own checks, such as token order
        raise UserError(f"{str(source)!r} does not fit: {one_line(error)}") from error
    return report


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


def freeze_all_but_attention(model: nn.Module) -> int:
    """Freeze all but attention, position embedding and classifier (arXiv:2203.09795).

    Attention is what lies in a module named `attn`: queries, keys, values and the projection
    after them; the norms and LayerScales around them are frozen, as are patch embedding, class
    token and MLPs. What the network itself holds fixed stays so.

    Returns:
        The number of parameters that remain trainable.

    Raises:
        UserError: the network has no attention.
    """
    head = classifier_names(model)
    attention = 0
    trainable = 0
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        attention += "attn" in parts
        keep = "attn" in parts or "pos_embed" in parts or name in head
        parameter.requires_grad_(keep and parameter.requires_grad)
        trainable += parameter.numel() * parameter.requires_grad
    if not attention:
        raise UserError(f"{type(model).__name__} has no attention layers: leave --attn-only away")
    return trainable
