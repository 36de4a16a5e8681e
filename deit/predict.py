"""Classify photographs by a checkpoint or by an exported ONNX file.

    python deit/predict.py photos/ --checkpoint runs/a/best_checkpoint.pth
    python deit/predict.py a.jpg b.png --onnx a.onnx --topk 3 --output predictions.csv

Files that cannot be read are named on stderr and skipped. The exit status is 0 if at least one
photograph was classified, 1 if none was, 2 if the command line or the network cannot be used.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.progress import track
from timm.layers import to_2tuple
from torch import Tensor

from deit.cli import CommandLine, OptionGroup, key_value, number, output_file
from deit.data import eval_transform
from deit.data.photos import Photos, find_photos
from deit.deploy.files import OnnxNetwork
from deit.deploy.info import NetworkInfo
from deit.errors import UserError, one_line_errors
from deit.saving import atomic_path
from deit.train.checkpoint import check_finite, model_state, read_checkpoint
from deit.train.distributed import choose_device
from deit.train.loading import adopt, build_as_trained

__all__ = ["get_parser", "main"]

Network = Callable[[Tensor], Tensor]


def get_parser() -> CommandLine:
    """The options of the script."""
    parser = CommandLine(prog="predict.py", description=__doc__)
    parser.add_argument("sources", nargs="+", metavar="FILE_OR_FOLDER", help="photographs")
    what = OptionGroup(parser, "network")
    what.add("--checkpoint", str, None, "FILE",
             "a file, an address or hf-hub:owner/name")  # fmt: skip
    what.add("--onnx", str, None, "FILE", "a file of deit/export.py")
    what.add("--model", str, None, "NAME", "for a checkpoint that does not say it")
    what.add("--model-kwargs", key_value, None, "KEY=VALUE",
             "arguments of the network other than those in the checkpoint", nargs="+")  # fmt: skip
    what.switch("--model-ema-eval", "take the average of the weights in the checkpoint")
    how = OptionGroup(parser, "how")
    how.add("--topk", number(int, 1), 5, "N", "classes for each photograph, the likeliest first")
    how.add("--output", output_file(".csv", ".jsonl"), None, "FILE",
            "write the predictions as .csv or .jsonl (default: print them)")  # fmt: skip
    how.switch("--mirror-check", "classify the mirror images too, and say how many differ")
    how.add("--batch-size", number(int, 1), 32, "N", "photographs at once")
    how.add("--num-workers", number(int, 1), 4, "N", "threads that read photographs")
    how.add("--device", str, "auto", "DEVICE", "auto, cpu, cuda, cuda:N or mps")
    how.add("--threads", number(int, 1), None, "N", "of the CPU (default: the runtime's choice)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Classify; returns the exit status.

    Raises:
        UserError: the command line or the network cannot be used, or there are no photographs.
    """
    args = get_parser().parse_args(argv)
    if bool(args.checkpoint) == bool(args.onnx):
        raise UserError("give one network: --checkpoint FILE or --onnx FILE")
    if args.onnx and (args.model or args.model_kwargs or args.model_ema_eval):
        raise UserError("--model, --model-kwargs and --model-ema-eval are for a --checkpoint: "
                        "an ONNX file is what it is")  # fmt: skip
    paths = find_photos(args.sources)
    network, info = _onnx(args) if args.onnx else _checkpoint(args)
    size = info.input_size[0] if len(set(info.input_size)) == 1 else info.input_size
    transform = eval_transform(size, crop_ratio=info.crop_ratio, interpolation=info.interpolation)
    photos = Photos(paths, transform, args.batch_size, args.num_workers)
    rows = _classify(args, network, info, photos, len(paths))
    for path, reason in photos.failures:
        print(f"skipped {_shown(path)}: {reason}", file=sys.stderr)
    if args.output and rows:
        _write(args.output, rows)
    elif not args.output:
        for row in rows:
            found = "  ".join(f"{p['class']} {p['probability']:.4f}" for p in row["predictions"])
            print(f"{_shown(row['file'])}  {found}")
    where = f", written to {args.output}" if args.output and rows else ""
    print(f"{len(rows)} photographs classified, {len(photos.failures)} skipped{where}")
    if args.mirror_check and rows:
        changed = sum(not row["same"] for row in rows)
        share = 100 * changed / len(rows)
        print(f"another class for the mirror image: {changed} of {len(rows)} ({share:.2f} %)")
    return 0 if rows else 1


def _shown(path: Path | str) -> str:
    """A name as any terminal can print it."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _checkpoint(args: argparse.Namespace) -> tuple[Network, NetworkInfo]:
    device = choose_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    checkpoint = read_checkpoint(args.checkpoint)
    state = model_state(checkpoint, source=args.checkpoint, ema=args.model_ema_eval)
    check_finite(state, args.checkpoint)
    network, used = build_as_trained(
        checkpoint, source=args.checkpoint, ema=args.model_ema_eval, model=args.model,
        kwargs=dict(args.model_kwargs or ()),
    )  # fmt: skip
    adopt(used, checkpoint, state, ("eval_crop_ratio",), source=args.checkpoint)
    if getattr(network, "in_chans", 3) != 3:
        raise UserError(f"{args.checkpoint!r} takes images of {network.in_chans} channels, and "
                        "photographs have 3")  # fmt: skip
    network = network.eval().to(device)
    names = None if network.class_names is None else tuple(network.class_names)
    info = NetworkInfo(
        used.model, to_2tuple(used.input_size), crop_ratio=used.eval_crop_ratio, class_names=names
    )
    return lambda images: network(images.to(device)).float().cpu(), info


def _onnx(args: argparse.Namespace) -> tuple[Network, NetworkInfo]:
    device = args.device
    if device == "auto":
        device = "cpu"
    network = OnnxNetwork(args.onnx, device, args.threads)
    try:
        info = NetworkInfo.from_metadata(network.metadata)
    except (ValueError, TypeError) as error:
        raise UserError(f"{args.onnx!r} does not say how to prepare images: it must be written by "
                        "deit/export.py") from error  # fmt: skip
    return network, info


@torch.no_grad()
def _classify(
    args: argparse.Namespace, network: Network, info: NetworkInfo, photos: Photos, count: int
) -> list[dict[str, Any]]:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (info.mean, info.std))
    console = Console(stderr=True)
    total = -(-count // args.batch_size)
    rows: list[dict[str, Any]] = []
    for paths, pixels in track(
        photos, "classifying", total, console=console, transient=True,
        disable=not console.is_terminal,
    ):  # fmt: skip
        if pixels is None:
            continue
        images = pixels.float() / 255
        if info.normalized:
            images = (images - mean) / std
        logits = network(images)
        mirrored = network(images.flip(-1)) if args.mirror_check else None
        for index, path in enumerate(paths):
            if not logits[index].isfinite().all():
                photos.failures.append((path, "the network's outputs are infinite or NaN"))
                continue
            row = {"file": str(path), "predictions": _best(logits[index], info, args.topk)}
            if mirrored is not None:
                row["mirrored"] = _best(mirrored[index], info, 1)[0]["class"]
                row["same"] = row["mirrored"] == row["predictions"][0]["class"]
            rows.append(row)
    return rows


def _best(logits: Tensor, info: NetworkInfo, count: int) -> list[dict[str, Any]]:
    values, places = logits.softmax(0).topk(min(count, len(logits)))
    names = info.class_names
    return [
        {"class": names[place] if names and place < len(names) else str(place),
         "output": place, "probability": value}
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
    ]  # fmt: skip


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line, or a table with a line for each photograph."""
    # names of files may have bytes that are no UTF-8
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        if path.suffix.lower() == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
            return
        writer = csv.writer(file)
        count = len(rows[0]["predictions"])
        header = [f"{what}_{n + 1}" for n in range(count) for what in ("class", "probability")]
        more = ["mirrored", "same"] if "same" in rows[0] else []
        writer.writerow(["file", *header, *more])
        for row in rows:
            found = [v for p in row["predictions"] for v in (p["class"], p["probability"])]
            writer.writerow([row["file"], *found, *(row[key] for key in more)])


if __name__ == "__main__":
    sys.exit(one_line_errors(partial(main, None)))
