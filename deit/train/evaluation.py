"""`--eval`: the scores of a checkpoint's network."""

from __future__ import annotations

import copy
from argparse import Namespace

from torch import nn

from deit.data import ImageDataset
from deit.deploy import fold
from deit.errors import UserError
from deit.train.build import (
    build_model,
    build_val_dataset,
    build_val_loader,
    label,
    number_of_classes,
)
from deit.train.checkpoint import Checkpoint
from deit.train.compilation import compile_network
from deit.train.distributed import DistContext
from deit.train.engine import Precision, evaluate
from deit.train.folder import LAST
from deit.train.loading import DATA, NETWORK, adopt, classifier_weight, find_checkpoints
from deit.train.resume import seed_all
from deit.train.weights import load_weights


def evaluate_checkpoint(args: Namespace, processes: DistContext) -> None:
    """Print the scores on the validation data of a checkpoint's network, its average, or both.

    Raises:
        UserError: the checkpoint or the data cannot be used, or the scores would mean nothing.
    """
    resumed, origin = find_checkpoints(args, processes)
    if args.resume and resumed is None:
        raise UserError(f"--eval --resume auto: there is no {LAST} in {args.output_dir!r}")
    checkpoint = resumed if origin is None else origin
    told: set[str] = set()
    for ema in (False, True) if args.model_ema_eval == "both" else (args.model_ema_eval,):
        own = copy.copy(args)  # which takes on what the checkpoint says
        if checkpoint is None:
            data = build_val_dataset(own)
            seed_all(args.seed)  # all processes have the same weights
            model, notes = build_model(own, number_of_classes(own, data))
            notes.insert(0, "evaluating random weights: no checkpoint is given by --resume")
        else:
            model, data, notes = _network(own, checkpoint, ema=ema and bool(args.resume))
        for note in notes + ([data.note] if data.note else []):
            if processes.is_main and note not in told:
                print(f"note    {note}", flush=True)
            told.add(note)
        model.to(processes.device)
        if args.fold:
            model = fold(model)
        if args.compile:
            compile_network(model, args.compile_mode, blocks=args.compile_blocks)
        scores = evaluate(
            model,
            build_val_loader(own, data, processes),
            own,
            precision=Precision.choose(processes.device, args.use_amp, args.amp_dtype),
            processes=processes,
        )
        if scores.bad:
            raise UserError(
                f"the logits of {scores.bad} of {scores.count} images are infinite or NaN: there "
                "is no accuracy; try --no-use-amp, or --amp-dtype bfloat16"
            )
        if processes.is_main:
            print(scores)
            images = f"{scores.count} test images"
            print(f"Accuracy of the network on the {images}: {scores.acc1:.1f}%", flush=True)


def _network(
    args: Namespace, checkpoint: Checkpoint, *, ema: bool
) -> tuple[nn.Module, ImageDataset, list[str]]:
    """The network with its weights, or with `ema` their average, the data with its labels, remarks.

    With --resume it is exactly the checkpoint's; with --finetune the one that a training would
    start from.
    """
    source, exact = checkpoint.source, bool(args.resume)
    adopted = adopt(args, checkpoint, (*NETWORK, *DATA), ema=ema)
    if not isinstance(args.input_size, int):
        height, width = args.input_size
        raise UserError(
            f"the network in {source} is for images of {height} x {width} pixels, those of an "
            "evaluation are square: deit.load gives the network"
        )
    data = build_val_dataset(args)
    weight = classifier_weight(checkpoint.state(ema), args.model)
    trained = None if weight is None else len(weight)
    if exact:
        outputs = trained or number_of_classes(args, data)
        if args.nb_classes not in (None, outputs):
            raise UserError(
                f"--nb-classes {args.nb_classes}, but the network in {source} has {outputs} "
                "outputs: omit it"
            )
    else:
        outputs = args.nb_classes or trained or data.num_classes
    model, remarks = build_model(args, outputs)
    report = load_weights(model, checkpoint, ema=ema, adapt=not exact, hint="; ".join(adopted))
    notes = [f"{source}: {checkpoint.which(ema)}" + ("" if exact else f"; {report}")]
    notes += adopted + remarks
    if exact or (trained is not None and not report.reinitialised):
        notes += label(args, [data], checkpoint, outputs)
    return model, data, notes
