"""`--eval`: the scores of a checkpoint's network."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from torch import nn

from deit.data import ImageDataset, match_classes, names_of_outputs, read_class_map
from deit.deploy import fold
from deit.errors import UserError
from deit.train.build import build_model, build_val_dataset, number_of_classes
from deit.train.checkpoint import (
    check_finite,
    load_weights,
    model_state,
    which_weights,
)
from deit.train.compilation import compile_network
from deit.train.distributed import DistContext
from deit.train.engine import Precision, describe, evaluate
from deit.train.finetune import load_for_finetune, read_for_finetune
from deit.train.loading import DATA, NETWORK, adopt, number_of_outputs
from deit.train.run import LAST, find_checkpoint
from deit.train.training import build_val_loader

__all__ = ["evaluate_once"]


def evaluate_once(args: Namespace, processes: DistContext) -> None:
    """Print the scores of a checkpoint's network on the validation data.

    Raises:
        UserError: the checkpoint or the data cannot be used, or the scores would mean nothing.
    """
    source, checkpoint = find_checkpoint(args, processes)
    if args.resume and checkpoint is None:
        raise UserError(f"--eval --resume auto: there is no {LAST} in {args.output_dir!r}")
    if checkpoint is None and args.finetune:
        source = args.finetune
        with processes.main_first():
            checkpoint = read_for_finetune(source, args.model_key, args.model_prefix)
    if checkpoint is None:
        notes = ["evaluating random weights: no checkpoint is given by --resume"]
        data = build_val_dataset(args)
        model, remarks = build_model(args, number_of_classes(args, data))
    else:
        build = _resumed if args.resume else _adapted
        model, data, remarks = build(args, checkpoint, source)
        notes = []
    if processes.is_main:
        for note in notes + remarks + ([data.note] if data.note else []):
            print(f"note    {note}", flush=True)
    model.to(processes.device)
    if args.fold:
        model = fold(model)
    if args.compile:
        compile_network(model, args.compile_mode, blocks=args.compile_blocks)
    scores = evaluate(
        model,
        build_val_loader(args, data, processes),
        precision=Precision.choose(processes.device, args.use_amp, args.amp_dtype),
        processes=processes,
        sharded=args.dist_eval,
        batch_size=args.batch_size,
        input_size=args.input_size,
        pad=args.compile,
        flop=args.flop_eval,
    )
    if scores.bad:
        raise UserError(
            f"the logits of {scores.bad} of {scores.count} images are infinite or NaN: there is "
            "no accuracy; try --no-use-amp, or --amp-dtype bfloat16"
        )
    if processes.is_main:
        print(describe(scores))
        images = f"{scores.count} test images"
        print(f"Accuracy of the network on the {images}: {scores.acc1:.1f}%", flush=True)


Built = tuple[nn.Module, ImageDataset, list[str]]


def _resumed(args: Namespace, checkpoint: Mapping[str, Any], source: str) -> Built:
    """The network exactly as in the checkpoint, and the data with its labels."""
    ema = args.model_ema_eval
    state = model_state(checkpoint, source=source, ema=ema)
    check_finite(state, source)
    adopted = adopt(args, checkpoint, state, (*NETWORK, *DATA), source=source)
    if not isinstance(args.input_size, int):
        height, width = args.input_size
        raise UserError(
            f"the network in {source} is for images of {height} x {width} pixels, those of an "
            "evaluation are square: deit.load gives the network"
        )
    data = build_val_dataset(args)
    outputs = number_of_outputs(state, args.model) or number_of_classes(args, data)
    if args.nb_classes not in (None, outputs):
        raise UserError(
            f"--nb-classes {args.nb_classes}, but the network in {source} has {outputs} outputs: "
            "omit it"
        )
    model, notes = build_model(args, outputs)
    hint = "; ".join(adopted)
    load_weights(model, checkpoint, source=source, ema=ema, hint=hint)
    notes = [f"{source}: {which_weights(checkpoint, ema)}", *adopted, *notes]
    return model, data, notes + label(args, data, checkpoint, outputs, source)


def _adapted(args: Namespace, checkpoint: Mapping[str, Any], source: str) -> Built:
    """The network as a training with --finetune would start from it."""
    state = model_state(checkpoint, source=source)
    check_finite(state, source)
    adopted = adopt(args, checkpoint, state, (*NETWORK, *DATA), source=source)
    data = build_val_dataset(args)
    outputs = number_of_outputs(state, args.model)
    model, notes = build_model(args, args.nb_classes or outputs or data.num_classes)
    report = load_for_finetune(model, state, source=source)
    notes = [f"{source}: {which_weights(checkpoint)}; {report}", *adopted, *notes]
    if outputs is not None and not report.reinitialised:
        notes += label(args, data, checkpoint, outputs, source)
    return model, data, notes


def label(
    args: Namespace,
    data: ImageDataset,
    checkpoint: Mapping[str, Any],
    outputs: int,
    source: str,
) -> list[str]:
    """Give the data the labels that the network's outputs stand for; remarks for the user."""
    if args.class_map:
        names, origin = read_class_map(args.class_map), f"--class-map {args.class_map}"
    else:
        saved = checkpoint.get("class_names") or ()
        names, origin = names_of_outputs(data.class_names, outputs, source=source, saved=saved)
    return match_classes(data, names, outputs, origin=origin)
