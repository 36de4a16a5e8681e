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

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors.torch import save
from torch import Tensor, nn

from deit.cli import CommandLine, OptionGroup, key_value, number, output_file
from deit.data import read_class_map
from deit.deploy import files, fold
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
    what.add("--resume", str, None, "FILE",
             "checkpoint: a file, an address or hf-hub:owner/name (default: random "
             "weights)")  # fmt: skip
    add_network_options(what)
    what.add("--nb-classes", number(int, 1), None, "N",
             "outputs, without --resume (default: 1000)")  # fmt: skip
    what.add("--input-size", number(int, 1), None, "PIXELS",
             "side, or height and width, of the images (default: what it was trained on, or 224)",
             nargs="+")  # fmt: skip
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


def add_network_options(group: OptionGroup) -> None:
    """What may be said of the network in a checkpoint."""
    group.add("--model", str, None, "NAME", "the network (default: what the checkpoint says)")
    group.add("--model-kwargs", key_value, None, "KEY=VALUE",
              "arguments of the network other than those that it was trained with",
              nargs="+")  # fmt: skip
    group.switch("--model-ema-eval", "take the average of the weights in the checkpoint")
    group.add("--class-map", str, None, "FILE", "what the outputs stand for: a name a line, or "
              "JSON (default: what the network's file says)")  # fmt: skip


def _validate(args: argparse.Namespace) -> None:
    onnx, program = args.format == "onnx", args.format != "safetensors"
    if args.output.suffix.lower() != SUFFIXES[args.format]:
        raise UserError(f"--output {args.output} of --format {args.format} must end in "
                        f"{SUFFIXES[args.format]}")  # fmt: skip
    if not (args.model or args.resume):
        raise UserError("nothing to export: give --resume FILE, or --model NAME for random weights")
    if args.input_size and len(args.input_size) > 2:
        raise UserError("--input-size takes a side, or height and width, not "
                        f"{len(args.input_size)} numbers")  # fmt: skip
    programs = "programs, not weights alone: use --format onnx or torch-export"
    purposes = {
        "nb_classes": (not args.resume, "random weights: omit it, the checkpoint says it"),
        "model_ema_eval": (args.resume, "the average in a checkpoint: give --resume FILE"),
        "fold": (program, programs),
        "normalize_input": (program, programs),
        "dynamic_batch": (program, programs),
        "batch_size": (program and not args.dynamic_batch,
                       "programs of one batch size: add --no-dynamic-batch to one, or omit it"),
        "half": (not args.quantize, "float16, --quantize for int8: drop one of the two"),
        "opset": (onnx, "--format onnx: omit it"),
        "quantize": (onnx, "--format onnx: use that"),
        "calibrate": (args.quantize == "static",
                      "--quantize static; --eval-data-path has what is measured on"),
        "eval_data_path": (args.quantize, "--quantize, whose loss it measures: add that"),
    }  # fmt: skip
    for option, (possible, purpose) in purposes.items():
        if option in args.given and getattr(args, option) is not False and not possible:
            raise UserError(f"--{option.replace('_', '-')} is for {purpose}")
    if args.quantize == "static" and args.calibrate is None:
        raise UserError("--quantize static takes the ranges of values from images: give "
                        "--calibrate FOLDER, or use --quantize dynamic")  # fmt: skip
    if onnx:
        files.require_onnx()
        if not files.ANY_BATCH_IN_ONNX and (args.dynamic_batch or args.quantize):
            raise UserError(f"torch {torch.__version__} writes ONNX files of one batch size in "
                            "float alone: use a later one, or omit --dynamic-batch and "
                            "--quantize")  # fmt: skip


def _network(args: argparse.Namespace) -> tuple[nn.Module, NetworkInfo, argparse.Namespace]:
    """The network as asked for, what the file is to say, and the options it was built with."""
    size = None if args.input_size is None else tuple(args.input_size)
    size = size[0] if size is not None and len(size) == 1 else size
    if args.resume:
        network, used = trained_network(args.resume, args, size)
    else:
        print("note    random weights: no checkpoint is given by --resume")
        used = parse_args([])
        used.model, used.model_kwargs, used.drop_path = args.model, args.model_kwargs, 0.0
        used.input_size = size or used.input_size
        network, _ = build_model(used, args.nb_classes or 1000)
        check_colours(network, args.model)
    names, outputs = (getattr(network, name, None) for name in ("class_names", "num_classes"))
    if args.class_map:
        names = read_class_map(args.class_map)
        if len(names) != outputs:
            raise UserError(f"--class-map {args.class_map} names {len(names)} classes, but the "
                            f"network has {outputs} outputs")  # fmt: skip
    info = replace(network_info(used, names), normalized=not args.normalize_input)
    return network.eval().requires_grad_(False), info, used


def trained_network(
    source: str, args: argparse.Namespace, size: int | tuple[int, int] | None = None
) -> tuple[nn.Module, argparse.Namespace]:
    """The network of a checkpoint with the options of `add_network_options`, for images of `size`.

    Also returns the options that it was built with.
    """
    network, used = build_as_trained(
        source, ema=args.model_ema_eval, model=args.model, img_size=size,
        kwargs=dict(args.model_kwargs or ()),
    )  # fmt: skip
    check_colours(network, used.model)
    return network, used


def check_colours(network: nn.Module, name: str) -> None:
    """Raise UserError unless the network takes images of three colours."""
    if (channels := input_channels(network)) != 3:
        raise UserError(f"{name} takes images of {channels} channels here, and images have 3")


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
) -> files.Runner:
    """Write the file in float; what runs it."""
    if args.format == "safetensors":
        saved = {name: getattr(used, name, None) for name in (*NETWORK, *PREPARATION)}
        metadata = {"format": "pt", **info.to_metadata(), "args": json.dumps(config_dict(saved))}
        copied = copy.deepcopy(network)
        state = (copied.half() if args.half else copied).state_dict()
        state = {name: value.contiguous().clone() for name, value in state.items()}
        path.write_bytes(save(state, metadata))  # `save_file` keeps files from other users
        copied.float().load_state_dict(read_checkpoint(path)["model"])
        return copied
    target = "onnx" if args.format == "onnx" else "torch"
    program = fold(network, target) if args.fold else copy.deepcopy(network)
    dtype = torch.float16 if args.half else torch.float32
    batch = 2 if args.dynamic_batch else args.batch_size
    return files.FORMATS[args.format](
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
    images, batches = _samples(SAMPLE_IMAGES, info), None
    if calibration is not None:
        size = None if args.dynamic_batch else args.batch_size
        batches = int8.calibration_batches(calibration, info, size)
        images = info.prepare(calibration)
    count = None if calibration is None else len(calibration)
    about = {"mode": args.quantize, "calibration_images": count, **files.QUANTIZATION}
    metadata = info.to_metadata() | {"quantization": json.dumps(about)}
    run = files.quantize_onnx(path, batches, metadata)
    if test is None:
        print("note    no accuracy is measured: --eval-data-path gives images with labels")
        test = [(batch, None) for batch in images.split(int8.BATCH)]
    return f"int8 ({args.quantize}); {int8.measure(network, run, test)}"


@torch.no_grad()
def _compare(run: files.Runner, network: nn.Module, info: NetworkInfo, args: argparse.Namespace):
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
        expected, found = network(images).double(), run(images).double()
        if found.shape != expected.shape:
            raise UserError(f"the file gives {tuple(found.shape)}, the network "
                            f"{tuple(expected.shape)}: it is not left")  # fmt: skip
        difference = found - expected
        relative = difference.norm().item() / (expected.norm().item() or 1.0)
        # written so that NaN fails too
        if not relative <= tolerance:
            raise UserError(f"the file's outputs differ from the network's by {relative:.1e} of "
                            f"their norm, more than {tolerance:.0e}: it is not left")  # fmt: skip
        worst, largest = max(worst, relative), max(largest, difference.abs().max().item())
    return (
        f"greatest difference from the network {largest:.1e} ({worst:.1e} of the norm of the "
        f"outputs; batches of {' and '.join(map(str, batches))})"
    )


def _samples(count: int, info: NetworkInfo) -> Tensor:
    """`count` natural images, then `count` random ones, as the file takes them."""
    images = sample_images(count, info.input_size).float()
    return images if info.normalized else images.sigmoid()


if __name__ == "__main__":
    sys.exit(run_command(main))
