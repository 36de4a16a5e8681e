"""Write a trained network as a file for other runtimes, folded, and check that file.

    python deit/export.py --resume runs/a/best_checkpoint.pth --format onnx --output a.onnx
    python deit/export.py --model d2_deit_small_patch16_LS --format torch-export --output s.pt2
    python deit/export.py --resume a.pth --format onnx --output a.onnx --quantize static \\
        --calibrate photos/ --eval-data-path imagenet/val

The file is run in its own runtime and compared with the network before it gets its name: one that
differs is not left. Its metadata hold the model, the class names and how to prepare images.

An int8 file differs by nature. It is refused if an output is infinite or NaN, or if its answers are
the network's no more often than guessing would be. Everything else is stated.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from deit.cli import CommandLine, OptionGroup, key_value, number, output_file
from deit.data import (
    build_dataset,
    build_eval_loader,
    eval_transform,
    match_classes,
    names_of_outputs,
    read_class_map,
)
from deit.data.photos import find_photos, read_photos
from deit.data.transforms import Transform
from deit.deploy import fold
from deit.deploy.files import (
    FORMATS,
    QUANTIZATION,
    Runner,
    quantize_onnx,
    require_onnx,
    write_safetensors,
)
from deit.deploy.info import NetworkInfo
from deit.errors import UserError, one_line, run_command
from deit.models.inputs import input_channels
from deit.saving import atomic_files
from deit.train.args import config_dict, parse_args
from deit.train.build import build_model
from deit.train.checkpoint import read_checkpoint
from deit.train.loading import NETWORK, PREPARATION, build_as_trained, network_info
from deit.train.metrics import Accuracy
from deit.verify.samples import images as sample_images

__all__ = ["get_parser", "main"]

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
# the largest difference from the network, relative to its logits' norm
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}
# that int8 takes the ranges of values from; more change them little
CALIBRATION_IMAGES = 512
SAMPLE_IMAGES = 32
MEASURED_AT_ONCE = 32

Batches = Iterable[tuple[Tensor, Tensor | None]]


def get_parser() -> CommandLine:
    """The options of the script."""
    parser = CommandLine(prog="export.py", description=__doc__)
    what = OptionGroup(parser, "network")
    what.add("--model", str, None, "NAME",
             "the network (default: what the checkpoint says)")  # fmt: skip
    what.add("--resume", str, None, "FILE",
             "checkpoint: a file, an address or hf-hub:owner/name (default: random "
             "weights)")  # fmt: skip
    what.switch("--model-ema-eval", "take the average of the weights")
    what.add("--model-kwargs", key_value, None, "KEY=VALUE",
             "arguments of the network other than those that it was trained with",
             nargs="+")  # fmt: skip
    what.add("--nb-classes", number(int, 1), None, "N",
             "outputs, without --resume (default: 1000)")  # fmt: skip
    what.add("--input-size", number(int, 1), None, "PIXELS",
             "side, or height and width, of the images (default: what it was trained on, or 224)",
             nargs="+")  # fmt: skip
    what.add("--class-map", str, None, "FILE",
             "what the outputs stand for: a name a line, or JSON (default: what the checkpoint "
             "says)")  # fmt: skip
    file = OptionGroup(parser, "file")
    file.add("--format", str, None, None, "safetensors holds the network's own weights, unfolded, "
             "for `deit.load` and --resume", choices=tuple(SUFFIXES), required=True)  # fmt: skip
    file.add("--output", output_file(*SUFFIXES.values()), None, "FILE", "written when it is "
             "complete and checked", required=True)  # fmt: skip
    file.switch("--fold", "fold the network into fewer, standard operations (not for safetensors)",
                default=True)  # fmt: skip
    file.switch("--dynamic-batch", "take any number of images at once")
    file.add("--batch-size", number(int, 1), 1, "N", "images at once without --dynamic-batch")
    file.switch("--normalize-input", "take values in [0, 1] and normalise them within the network")
    file.switch("--half", "in float16, images and logits too")
    file.add("--opset", number(int, 1), None, "N", "of ONNX (default: the exporter's)")
    small = OptionGroup(parser, "int8", "Linear layers and dense convolutions of ONNX files in "
                        "8 bits, everything else in float32.")  # fmt: skip
    small.add("--quantize", str, None, None, "dynamic: the ranges of values are measured for each "
              "batch when the file runs; static: they are fixed, taken from the images of "
              "--calibrate", choices=("dynamic", "static"))  # fmt: skip
    small.add("--calibrate", str, None, "FOLDER", "images for --quantize static, at most "
              f"{CALIBRATION_IMAGES} of them; they need no labels")  # fmt: skip
    small.add("--eval-data-path", str, None, "FOLDER", "test images, a folder a class, on which "
              "the loss of accuracy is measured (default: no labels, the images of --calibrate or "
              "the bundled sample)")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns the exit status 0.

    Raises:
        UserError: something that was asked for cannot be, or the file differs from the network.
    """
    args = get_parser().parse_args(argv)
    _validate(args)
    network, info, used = _network(args)
    images = None if args.calibrate is None else _calibration_images(args.calibrate, info)
    if args.quantize:
        test = _test_images(args, info, network.num_classes, images)
    if args.normalize_input:
        network = _Normalized(network, info)
    with atomic_files(args.output) as path:
        try:
            text = _compare(_write(args, network, info, used, path), network, info, args)
            if args.quantize:
                batches = None if images is None else _calibration_batches(args, info, images)
                run = quantize_onnx(path, batches, _metadata(args, info, images))
                text = f"int8 ({args.quantize}); " + _measure(run, network, test)
            size = sum(file.stat().st_size for file in path.parent.iterdir())
        except (UserError, OSError):
            raise
        except Exception as error:  # exporters raise whatever they like
            reason = one_line(error)[:300]
            raise UserError(f"{info.model} cannot be written as {args.format}: {reason}") from error
    print(f"{args.output}  {size / 1e6:.1f} MB  {info.model}, {args.format}; {text}")
    return 0


def _validate(args: argparse.Namespace) -> None:
    suffix = SUFFIXES[args.format]
    if args.output.suffix.lower() != suffix:
        raise UserError(f"--output {args.output} of --format {args.format} must end in {suffix}")
    if not (args.model or args.resume):
        raise UserError("nothing to export: give --resume FILE, or --model NAME for random weights")
    if args.resume and args.nb_classes:
        raise UserError("--nb-classes is for random weights: the checkpoint says it, omit it")
    if args.model_ema_eval and not args.resume:
        raise UserError("--model-ema-eval takes the average in a checkpoint: give --resume FILE")
    if args.input_size and len(args.input_size) > 2:
        raise UserError("--input-size takes a side, or height and width, not "
                        f"{len(args.input_size)} numbers")  # fmt: skip
    if args.format == "safetensors":
        wrong = {"--normalize-input", "--dynamic-batch", "--batch-size"} & {
            "--" + name.replace("_", "-") for name in args.given
        }
        if wrong or ("fold" in args.given and args.fold):
            raise UserError(f"{sorted(wrong)[0] if wrong else '--fold'} is for programs; "
                            "safetensors holds weights alone: use --format onnx or "
                            "torch-export")  # fmt: skip
    if args.dynamic_batch and "batch_size" in args.given:
        raise UserError("--dynamic-batch takes any batch: omit --batch-size")
    for option in ("opset", "quantize"):
        if getattr(args, option) is not None and args.format != "onnx":
            raise UserError(f"--{option} is of ONNX, not of {args.format}: omit it")
    _validate_int8(args)
    if args.format == "onnx":
        require_onnx()


def _validate_int8(args: argparse.Namespace) -> None:
    if args.quantize and args.half:
        raise UserError("--half and --quantize: a file is in float16 or in int8, omit one of them")
    if args.quantize == "static" and args.calibrate is None:
        raise UserError("--quantize static takes the ranges of values from images: give "
                        "--calibrate FOLDER, or use --quantize dynamic")  # fmt: skip
    if args.quantize != "static" and args.calibrate is not None:
        raise UserError("--calibrate is for --quantize static: omit it, or give that too; what is "
                        "measured on is --eval-data-path")  # fmt: skip
    if args.eval_data_path is not None and not args.quantize:
        raise UserError("--eval-data-path measures what --quantize loses: omit it, or give that "
                        "too")  # fmt: skip


def _network(args: argparse.Namespace) -> tuple[nn.Module, NetworkInfo, argparse.Namespace]:
    """The network as asked for, what the file is to say, and the options it was built with."""
    size: Any = args.input_size
    if size is not None:
        size = size[0] if len(size) == 1 else tuple(size)
    kwargs = dict(args.model_kwargs or ())
    if args.resume:
        network, used = build_as_trained(
            read_checkpoint(args.resume), source=args.resume, ema=args.model_ema_eval,
            model=args.model, img_size=size, kwargs=kwargs,
        )  # fmt: skip
        names = network.class_names
    else:
        print("note    random weights: no checkpoint is given by --resume")
        used = parse_args([])
        used.model, used.model_kwargs, used.drop_path = args.model, list(kwargs.items()), 0.0
        used.input_size = size or used.input_size
        network, _ = build_model(used, args.nb_classes or 1000)
        names = None
    if (channels := input_channels(network)) != 3:
        raise UserError(f"{used.model} takes images of {channels} channels here, and files are "
                        "written and checked for those of 3")  # fmt: skip
    outputs = getattr(network, "num_classes", None)
    if args.class_map:
        names = read_class_map(args.class_map)
        if len(names) != outputs:
            raise UserError(f"--class-map {args.class_map} names {len(names)} classes, but the "
                            f"network has {outputs} outputs")  # fmt: skip
    info = replace(network_info(used, names), normalized=not args.normalize_input)
    return network.eval().requires_grad_(False), info, used


class _Normalized(nn.Module):
    """`network` for images (B, 3, H, W) of values in [0, 1]."""

    def __init__(self, network: nn.Module, info: NetworkInfo) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(info.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(info.std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def _metadata(
    args: argparse.Namespace, info: NetworkInfo, calibration: Tensor | None = None
) -> dict[str, str]:
    metadata = info.to_metadata()
    if args.quantize:
        count = None if calibration is None else len(calibration)
        said = {"mode": args.quantize, "calibration_images": count, **QUANTIZATION}
        metadata["quantization"] = json.dumps(said)
    return metadata


@torch.no_grad()
def _write(
    args: argparse.Namespace,
    network: nn.Module,
    info: NetworkInfo,
    used: argparse.Namespace,
    path: Path,
) -> Runner:
    """Write the file in float; what runs it."""
    if args.format == "safetensors":
        saved = {name: getattr(used, name, None) for name in (*NETWORK, *PREPARATION)}
        metadata = {**info.to_metadata(), "args": json.dumps(config_dict(saved))}
        write_safetensors(copy.deepcopy(network).half() if args.half else network, path, metadata)
        copied = copy.deepcopy(network)
        copied.load_state_dict(read_checkpoint(path)["model"])
        return copied
    target = "onnx" if args.format == "onnx" else "torch"
    program = fold(network, target) if args.fold else copy.deepcopy(network)
    dtype = torch.float16 if args.half else torch.float32
    batch = 2 if args.dynamic_batch else args.batch_size
    return FORMATS[args.format](
        program.to(dtype), torch.zeros(batch, 3, *info.input_size, dtype=dtype), path,
        info.to_metadata(), dynamic=args.dynamic_batch, opset=args.opset,
    )  # fmt: skip


@torch.no_grad()
def _compare(run: Runner, network: nn.Module, info: NetworkInfo, args: argparse.Namespace) -> str:
    """How far the outputs of `run` are from the network's on natural and random images.

    Raises:
        UserError: farther than rounding can explain.
    """
    tolerance = TOLERANCE[torch.float16 if args.half else torch.float32]
    any_batch = args.dynamic_batch or args.format == "safetensors"
    batches = (1, 3) if any_batch else (args.batch_size,)
    worst = largest = 0.0
    for batch in batches:
        images = _samples(batch, info)[batch // 2 :][:batch]
        expected, found = network(images), run(images)
        if found.shape != expected.shape:
            raise UserError(f"the file gives {tuple(found.shape)}, the network "
                            f"{tuple(expected.shape)}: it is not left")  # fmt: skip
        difference = found.double() - expected.double()
        relative = difference.norm().item() / (expected.double().norm().item() or 1.0)
        # written so that NaN fails too
        if not relative <= tolerance:
            raise UserError(f"the file's outputs differ from the network's by {relative:.1e} of "
                            f"their norm, more than {tolerance:.0e}: it is not left")  # fmt: skip
        worst, largest = max(worst, relative), max(largest, difference.abs().max().item())
    counts = " and ".join(map(str, batches))
    return (
        f"greatest difference from the network {largest:.1e} "
        f"({worst:.1e} of the norm of the outputs; batches of {counts})"
    )


def _samples(count: int, info: NetworkInfo) -> Tensor:
    """`count` natural images, then `count` random ones, as the file takes them."""
    images = sample_images(count, info.input_size).float()
    return images if info.normalized else images.sigmoid()


def _calibration_images(folder: str, info: NetworkInfo) -> Tensor:
    """Images of a folder, uint8 (N, 3, H, W), evenly from all of them if there are many."""
    if not Path(folder).is_dir():
        raise UserError(f"--calibrate: there is no folder {folder!r}")
    paths, _ = find_photos([folder])
    paths = paths[:: -(-len(paths) // CALIBRATION_IMAGES)]
    found = []
    for batch in read_photos(paths, _transform(info), MEASURED_AT_ONCE, threads=4):
        for path, reason in batch.failures:
            print(f"skipped {path}: {reason}", file=sys.stderr)
        found += [] if batch.images is None else [batch.images]
    if not found:
        raise UserError(f"--calibrate: none of the images in {folder!r} can be read")
    return torch.cat(found)


def _transform(info: NetworkInfo) -> Transform:
    return eval_transform(
        info.input_size, crop_ratio=info.crop_ratio, warp=info.warp,
        interpolation=info.interpolation,
    )  # fmt: skip


def _calibration_batches(
    args: argparse.Namespace, info: NetworkInfo, images: Tensor
) -> Iterator[Tensor]:
    """The images as a file of a fixed batch size takes them: the first fill the last batch.

    Their mirror images too: antisymmetric features then have ranges around zero, and round the same
    with either sign.
    """
    size = MEASURED_AT_ONCE if args.dynamic_batch else args.batch_size
    for start in range(0, len(images), size):
        end = start + size if not args.dynamic_batch else min(start + size, len(images))
        batch = info.prepare(images[torch.arange(start, end) % len(images)])
        yield batch
        yield batch.flip(-1)


def _test_images(
    args: argparse.Namespace, info: NetworkInfo, outputs: int, calibration: Tensor | None
) -> Batches:
    """What int8 is measured on: batches of images and labels, which are None without labels."""
    if args.eval_data_path is None:
        if calibration is None:
            print(f"note    measured on {2 * SAMPLE_IMAGES} sample images: --eval-data-path gives "
                  "others, with the accuracy")  # fmt: skip
            images = _samples(SAMPLE_IMAGES, info).split(MEASURED_AT_ONCE)
        else:
            images = map(info.prepare, calibration.split(MEASURED_AT_ONCE))
        return [(batch, None) for batch in images]
    data = build_dataset("val", class_folders=args.eval_data_path, transform=_transform(info))
    names, origin = names_of_outputs(
        data.class_names, outputs, source=info.model, saved=info.class_names or ()
    )
    for note in [data.note, *match_classes(data, names, outputs, origin=origin)]:
        if note:
            print(f"note    {note}")
    mean, std = (info.mean, info.std) if info.normalized else ((0.0,) * 3, (1.0,) * 3)
    return build_eval_loader(data, batch_size=MEASURED_AT_ONCE, device="cpu", mean=mean, std=std)


@torch.no_grad()
def _measure(run: Runner, network: nn.Module, batches: Batches) -> str:
    """What int8 changes: outputs, answers, accuracy where there are labels, mirror symmetry.

    Raises:
        UserError: an output is not finite, or the answers agree no better than guesses.
    """
    networks = {"float": network, "int8": run}
    scores = {name: Accuracy() for name in networks}
    mirror = dict.fromkeys(networks, 0.0)
    agreement = Accuracy()
    largest = distance = norm = 0.0
    labelled = False
    console = Console(stderr=True)
    for images, labels in track(
        batches, "measuring", console=console, transient=True, disable=not console.is_terminal
    ):
        logits, flopped = (
            {name: one(batch) for name, one in networks.items()}
            for batch in (images, images.flip(-1))
        )
        expected, found = logits["float"], logits["int8"]
        if expected.ndim != 2:
            raise UserError(f"--quantize needs a classifier, which gives (B, classes) and not "
                            f"{tuple(expected.shape)}")  # fmt: skip
        if not (found.isfinite().all() and flopped["int8"].isfinite().all()):
            raise UserError("the int8 file gives outputs that are infinite or NaN: it is not left")
        answers = expected.argmax(1)
        agreement.update(found, answers)
        for name, score in scores.items():
            score.update(logits[name], answers if labels is None else labels, flopped[name])
            change = (logits[name] - flopped[name]).abs().max().item()
            mirror[name] = max(mirror[name], change)
        difference = (found - expected).double()
        largest = max(largest, difference.abs().max().item())
        distance, norm = distance + difference.square().sum(), norm + expected.square().sum()
        labelled = labels is not None
    same = agreement.compute()
    _check_agreement(same.acc1 / 100, same.count, expected.shape[1])
    results = {name: score.compute() for name, score in scores.items()}
    lines = [
        f"greatest difference from the float network {largest:.1e} "
        f"({sqrt(distance / norm):.1e} of the norm of the outputs), the same answer for "
        f"{same.acc1:.2f} % of {same.count} images",
        *(
            f"mirrored, {name}: another answer for {100 - result.same:.2f} % of the images, "
            f"greatest difference {mirror[name]:.1e}"
            for name, result in results.items()
        ),
    ]
    if labelled:
        before, after = (result.acc1 for result in results.values())
        lines.append(f"accuracy: float {before:.2f} %, int8 {after:.2f} %, "
                     f"a loss of {before - after:.2f} points")  # fmt: skip
    return "\n    ".join(lines)


def _check_agreement(share: float, count: int, classes: int) -> None:
    """Refuse a share of equal answers that guesses reach, up to two of its standard deviations."""
    chance = 1 / classes
    guessed = chance + 2 * sqrt(chance * (1 - chance) / count)
    if share < 1 and share <= guessed:
        raise UserError(
            f"the int8 file gives the network's answer for {100 * share:.1f} % of {count} images, "
            f"no more than guessing among {classes} classes would: it is not left"
        )


if __name__ == "__main__":
    sys.exit(run_command(partial(main, None)))
