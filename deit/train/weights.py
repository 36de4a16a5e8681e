"""Weights of a checkpoint into a network: as they are, or adapted to another size or classes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from deit.errors import UserError, one_line, some
from deit.models.published import adapt_state
from deit.train.checkpoint import Checkpoint, counted


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

    loaded: int
    adapted: list[str]
    reinitialised: list[str]
    missing: list[str]
    unexpected: list[str]

    def __str__(self) -> str:
        """One line that names what was not simply loaded."""
        parts = {
            "resampled": self.adapted,
            "initialised anew": self.reinitialised,
            "not in the checkpoint and left at random": self.missing,
            "of the checkpoint not used": self.unexpected,
        }
        listed = [
            f", {len(names)} {verb} ({some(names)})" for verb, names in parts.items() if names
        ]
        return f"{self.loaded} tensors loaded" + "".join(listed)


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
    bad = [n for n, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise UserError(
            f"{source!r} has weights that are infinite or NaN, in {counted(bad, 'tensor')}: that "
            "training had diverged; take an earlier checkpoint"
        )
    # timm's convention: the module that defines a network has it
    modules = [sys.modules[cls.__module__] for cls in type(model).__mro__] if adapt else []
    filters = [m.checkpoint_filter_fn for m in modules if hasattr(m, "checkpoint_filter_fn")]
    try:
        found = filters[0](dict(state), model) if filters else state
    except (KeyError, RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"{source!r} cannot be fitted: {one_line(error)}") from error
    own = model.state_dict()
    fitted = {n: v for n, v in found.items() if n in own and v.shape == own[n].shape}
    head = classifier_names(model) if adapt else set()
    # A weight without its bias would be half a classifier.
    if not new_classes and not any(name in state and name not in fitted for name in head):
        head = set()
    fitted = {name: value for name, value in fitted.items() if name not in head}
    report = LoadReport(
        loaded=len(fitted),
        adapted=[n for n in fitted if n in state and fitted[n].shape != state[n].shape],
        reinitialised=sorted(head),
        missing=[name for name in own if name not in found and name not in head],
        unexpected=[name for name in found if name not in own],
    )
    wrong = [
        f"{name} {list(value.shape)} and not {list(own[name].shape)}"
        for name, value in found.items()
        if name in own and name not in fitted and name not in head
    ]
    problem = _misfit(report, wrong, adapt)
    try:
        if not problem:
            model.load_state_dict(fitted, strict=False)
    except (RuntimeError, ValueError) as error:  # a network's own checks, such as token order
        problem = one_line(error)
    if problem:
        trained = None if adapt else checkpoint.options.get("model")
        origin = f"it was saved from model {trained!r}" if trained else ""
        text = "; ".join(filter(None, (problem, origin, hint)))
        raise UserError(f"checkpoint {source!r} does not fit this {type(model).__name__}: {text}")
    return report


def _misfit(report: LoadReport, wrong: Sequence[str], adapt: bool) -> str:
    """What keeps weights from being those of exactly this network, or from being adapted to it."""
    shapes = counted(wrong, "tensor", " of another shape")
    if adapt and (wrong or report.loaded >= len(report.missing)):
        return shapes
    keys = (counted(report.missing, "missing key"), counted(report.unexpected, "unexpected key"))
    counts = ", ".join(filter(None, (*keys, shapes)))
    return f"it is of another network, {report.loaded} tensors fit, {counts}" if adapt else counts


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
