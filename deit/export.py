"""Write a trained network as a file for other runtimes, folded, and check that file.

    python deit/export.py --resume runs/a/best_checkpoint.pth --format onnx --output a.onnx
    python deit/export.py --model d2_deit_small_patch16_LS --format torch-export --output s.pt2

The file is run in its own runtime and compared with the network before it gets its name: one that
differs is not left. Its metadata hold the model, the class names and how to prepare images.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from deit.cli import CommandLine, OptionGroup, key_value, number, output_file
from deit.data import read_class_map
from deit.deploy import fold
from deit.deploy.files import FORMATS, require_onnx, write_safetensors
from deit.deploy.info import NetworkInfo
from deit.errors import UserError, one_line, one_line_errors
from deit.saving import atomic_files
from deit.train.args import config_dict, parse_args
from deit.train.build import build_model
from deit.train.checkpoint import check_finite, model_state, read_checkpoint
from deit.train.loading import NETWORK, PREPARATION, adopt, build_as_trained, network_info
from deit.verify.samples import images as sample_images

__all__ = ["get_parser", "main"]

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
# the largest difference from the network, relative to its logits' norm
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}


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
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export; returns the exit status 0.

    Raises:
        UserError: something that was asked for cannot be, or the file differs from the network.
    """
    args = get_parser().parse_args(argv)
    _validate(args)
    network, info, used = _network(args)
    write = _write_program
    if args.format == "safetensors":
        saved = {name: getattr(used, name, None) for name in (*NETWORK, *PREPARATION)}
        write = partial(_write_weights, saved)
    with atomic_files(args.output) as path:
        try:
            text = write(args, network, info, path)
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
    if args.opset is not None and args.format != "onnx":
        raise UserError(f"--opset is of ONNX, not of {args.format}: omit it")
    if args.format == "onnx":
        require_onnx()


def _network(args: argparse.Namespace) -> tuple[nn.Module, NetworkInfo, argparse.Namespace]:
    """The network as asked for, what the file is to say, and the options it was built with."""
    size: Any = args.input_size
    if size is not None:
        size = size[0] if len(size) == 1 else tuple(size)
    kwargs = dict(args.model_kwargs or ())
    if args.resume:
        checkpoint = read_checkpoint(args.resume)
        state = model_state(checkpoint, source=args.resume, ema=args.model_ema_eval)
        check_finite(state, args.resume)
        network, used = build_as_trained(
            checkpoint, source=args.resume, ema=args.model_ema_eval, model=args.model,
            img_size=size, kwargs=kwargs,
        )  # fmt: skip
        adopt(used, checkpoint, state, PREPARATION, source=args.resume)
        names = network.class_names
    else:
        print("note    random weights: no checkpoint is given by --resume")
        used = parse_args([])
        used.model, used.model_kwargs, used.drop_path = args.model, list(kwargs.items()), 0.0
        used.input_size = size or used.input_size
        network, _ = build_model(used, args.nb_classes or 1000)
        names = None
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


def _dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.float16 if args.half else torch.float32


@torch.no_grad()
def _write_program(
    args: argparse.Namespace, network: nn.Module, info: NetworkInfo, path: Path
) -> str:
    target = "onnx" if args.format == "onnx" else "torch"
    program = fold(network, target) if args.fold else network
    if args.normalize_input:
        program, network = _Normalized(program, info), _Normalized(network, info)
    if args.half:
        program = copy.deepcopy(program).half()
    batch = 2 if args.dynamic_batch else args.batch_size
    example = torch.zeros(batch, 3, *info.input_size, dtype=_dtype(args))
    run = FORMATS[args.format](
        program, example, path, info.to_metadata(), dynamic=args.dynamic_batch, opset=args.opset
    )
    batches = (1, 3) if args.dynamic_batch else (args.batch_size,)
    return _compare(run, network, info, batches, _dtype(args))


@torch.no_grad()
def _write_weights(
    saved: dict[str, Any],
    args: argparse.Namespace,
    network: nn.Module,
    info: NetworkInfo,
    path: Path,
) -> str:
    stored = copy.deepcopy(network).half() if args.half else network
    metadata = {**info.to_metadata(), "args": json.dumps(config_dict(saved))}
    write_safetensors(stored, path, metadata)
    copied = copy.deepcopy(network)
    copied.load_state_dict(read_checkpoint(path)["model"])
    return _compare(copied, network, info, (2,), _dtype(args))


def _compare(
    run: Callable[[Tensor], Tensor],
    network: nn.Module,
    info: NetworkInfo,
    batches: tuple[int, ...],
    dtype: torch.dtype,
) -> str:
    """How far the outputs of `run` are from the network's on natural and random images.

    Raises:
        UserError: farther than rounding can explain.
    """
    worst = largest = 0.0
    for batch in batches:
        images = sample_images(batch, info.input_size)[batch // 2 :][:batch].float()
        if not info.normalized:
            images = images.sigmoid()
        expected, found = network(images), run(images)
        if found.shape != expected.shape:
            raise UserError(f"the file gives {tuple(found.shape)}, the network "
                            f"{tuple(expected.shape)}: it is not left")  # fmt: skip
        difference = found.double() - expected.double()
        scale = expected.double().norm().item() or 1.0
        relative = difference.norm().item() / scale
        # written so that NaN fails too
        if not relative <= TOLERANCE[dtype]:
            raise UserError(f"the file's outputs differ from the network's by {relative:.1e} of "
                            f"their norm, more than {TOLERANCE[dtype]:.0e}: it is not "
                            "left")  # fmt: skip
        worst, largest = max(worst, relative), max(largest, difference.abs().max().item())
    counts = " and ".join(map(str, batches))
    return (
        f"greatest difference from the network {largest:.1e} "
        f"({worst:.1e} of the norm of the outputs; batches of {counts})"
    )


if __name__ == "__main__":
    sys.exit(one_line_errors(partial(main, None)))
