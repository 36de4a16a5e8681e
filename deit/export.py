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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from deit.cli import CommandLine, OptionGroup, key_value, number, output_file
from deit.data import read_class_map
from deit.deploy import fold
from deit.deploy.files import (
    ANY_BATCH_IN_ONNX,
    FORMATS,
    QUANTIZATION,
    Runner,
    quantize_onnx,
    require_onnx,
    write_safetensors,
)
from deit.deploy.info import NetworkInfo
from deit.errors import UserError, one_line, run_command
from deit.measure import int8
from deit.models.inputs import input_channels
from deit.saving import atomic_path
from deit.train.args import config_dict, parse_args
from deit.train.build import build_model
from deit.train.checkpoint import read_checkpoint
from deit.train.loading import NETWORK, PREPARATION, build_as_trained, network_info
from deit.verify.samples import images as sample_images

__all__ = ["get_parser", "main"]

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
# the largest difference from the network, relative to its logits' norm
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}
SAMPLE_IMAGES = 32


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
              f"{int8.CALIBRATION_IMAGES} of them; they need no labels")  # fmt: skip
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
    calibration = test = None
    if args.calibrate is not None:
        calibration = int8.calibration_images(args.calibrate, info)
    if args.eval_data_path is not None:
        test = int8.labelled_images(args.eval_data_path, info, network.num_classes)
    if args.normalize_input:
        network = _Normalized(network, info)
    with atomic_path(args.output) as path:
        try:
            text = _compare(_write(args, network, info, used, path), network, info, args)
            if args.quantize:
                text = _quantize(args, network, info, path, calibration, test)
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
        if not ANY_BATCH_IN_ONNX and (args.dynamic_batch or args.quantize):
            raise UserError(f"torch {torch.__version__} writes ONNX files of one batch size in "
                            "float alone: use a later one, or omit --dynamic-batch and "
                            "--quantize")  # fmt: skip


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
            read_checkpoint(args.resume), ema=args.model_ema_eval,
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


def _quantize(
    args: argparse.Namespace,
    network: nn.Module,
    info: NetworkInfo,
    path: Path,
    calibration: Tensor | None,
    test: int8.Batches | None,
) -> str:
    """Replace the file by one in int8; what that changes, on `test` or else on what there is."""
    batches = None
    if calibration is not None:
        size = None if args.dynamic_batch else args.batch_size
        batches = int8.calibration_batches(calibration, info, size)
    images = None if calibration is None else len(calibration)
    about = {"mode": args.quantize, "calibration_images": images, **QUANTIZATION}
    run = quantize_onnx(path, batches, info.to_metadata() | {"quantization": json.dumps(about)})
    if test is None:
        print("note    no accuracy is measured: --eval-data-path gives images with labels")
        images = _samples(SAMPLE_IMAGES, info) if batches is None else info.prepare(calibration)
        test = [(batch, None) for batch in images.split(int8.BATCH)]
    return f"int8 ({args.quantize}); {int8.measure(network, run, test)}"


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


if __name__ == "__main__":
    sys.exit(run_command(main))
