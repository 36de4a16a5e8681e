"""Classify photographs by a checkpoint or by an exported ONNX file.

    python deit/predict.py photos/ --checkpoint runs/a/best_checkpoint.pth
    python deit/predict.py a.jpg b.png --onnx a.onnx --topk 3 --output predictions.csv

Files that cannot be read are named on stderr and skipped. The exit status is 0 if at least one
photograph was classified, 1 if none was, 2 if the command line or the network cannot be used or
the network's outputs are infinite or NaN for some photographs, 130 after Ctrl-C. A file of --output
gets its name when it is complete. Where nothing says what the outputs stand for, 1000 are
ImageNet-1K's classes, and others numbers.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.progress import Progress
from timm.data import ImageNetInfo
from torch import Tensor

from deit.cli import CommandLine, OptionGroup, number, output_file
from deit.data import outputs_of, read_class_map
from deit.data.photos import find_photos, read_photos
from deit.deploy.files import OnnxNetwork
from deit.deploy.info import NetworkInfo
from deit.errors import UserError, one_line, run_command
from deit.export import add_network_options, trained_network
from deit.saving import atomic_path
from deit.train.distributed import choose_device
from deit.train.loading import network_info
from deit.train.options import device_name

__all__ = ["command", "get_parser", "main"]

Network = Callable[[Tensor], Tensor]
Row = dict[str, Any]


def get_parser() -> CommandLine:
    """The options of the script."""
    parser = CommandLine(prog="predict.py", description=__doc__)
    parser.add_argument("sources", nargs="+", metavar="FILE_OR_FOLDER", help="photographs")
    what = OptionGroup(parser, "network")
    what.add("--checkpoint", str, None, "FILE",
             "a file, an address or hf-hub:owner/name")  # fmt: skip
    what.add("--onnx", str, None, "FILE", "a file of deit/export.py")
    add_network_options(what)
    how = OptionGroup(parser, "how")
    how.add("--topk", number(int, 1), 5, "N", "classes for each photograph, the likeliest first")
    how.add("--output", output_file(".csv", ".jsonl"), None, "FILE",
            "write the predictions as .csv or .jsonl (default: print them)")  # fmt: skip
    how.switch("--mirror-check", "classify the mirror images too, and say how many differ")
    how.add("--batch-size", number(int, 1), 32, "N", "photographs at once")
    how.add("--num-workers", number(int, 1), 4, "N", "threads that read photographs")
    how.add("--device", device_name, "auto", "DEVICE", "auto, cpu, cuda, cuda:N or mps")
    how.add("--threads", number(int, 1), None, "N", "of the CPU (default: the runtime's choice)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Classify; returns the exit status.

    Raises:
        UserError: the command line or the network cannot be used, there are no photographs, or
            outputs were not finite; then the other photographs are classified nevertheless.
    """
    args = get_parser().parse_args(argv)
    if bool(args.checkpoint) == bool(args.onnx):
        raise UserError("give one network: --checkpoint FILE or --onnx FILE")
    if args.onnx and (args.model or args.model_kwargs or args.model_ema_eval):
        raise UserError("--model, --model-kwargs and --model-ema-eval are for a --checkpoint: "
                        "an ONNX file is what it is")  # fmt: skip
    if str(args.checkpoint).endswith(".onnx"):
        raise UserError(f"{args.checkpoint!r} is no checkpoint: give it by --onnx")
    paths, left_out = find_photos(args.sources)
    if left_out:
        print(f"note    {_shown(left_out)}", file=sys.stderr)
    network, info = _network(args)
    counts: Counter[str] = Counter()
    # a bar on stderr unless the rows appear in the same terminal
    console = Console(stderr=True)
    shown = console.is_terminal and (args.output or not sys.stdout.isatty())
    with Progress(
        console=console, transient=True, redirect_stdout=False, disable=not shown
    ) as progress:
        batches = progress.track(
            read_photos(paths, info.transform(), args.batch_size, args.num_workers),
            -(-len(paths) // args.batch_size), description="classifying",
        )  # fmt: skip
        rows = _classify(args, network, info, batches, counts)
        if args.output:
            _write(args.output, rows)
        else:
            _print(rows)
    done, changed = counts["classified"], counts["changed"]
    where = f", written to {args.output}" if args.output and done else ""
    print(f"{done} photographs classified, {len(paths) - done} skipped{where}")
    if args.mirror_check and done:
        share = 100 * changed / done
        print(f"another class for the mirror image: {changed} of {done} ({share:.2f} %)")
    if counts["not finite"]:
        raise UserError(f"the network's outputs are infinite or NaN for {counts['not finite']} "
                        "photographs, which are left out")  # fmt: skip
    return 0 if done else 1


def _shown(path: str) -> str:
    """A name as any terminal can print it."""
    return path.encode("utf-8", "backslashreplace").decode()


def _network(args: argparse.Namespace) -> tuple[Network, NetworkInfo]:
    if args.onnx:
        device = "cpu" if args.device == "auto" else args.device
        onnx = OnnxNetwork(args.onnx, device, args.threads)
        try:
            return onnx, NetworkInfo.from_metadata(onnx.metadata)
        except (ValueError, TypeError) as error:
            raise UserError(f"{args.onnx!r} does not say how to prepare images: it must be written "
                            "by deit/export.py") from error  # fmt: skip
    device = choose_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    network, used = trained_network(args.checkpoint, args)
    network.eval().to(device)
    info = network_info(used, network.class_names)
    return lambda images: network(images.to(device)).float().cpu(), info


def _labels(args: argparse.Namespace, info: NetworkInfo, outputs: int) -> list[Row]:
    """What a prediction says of each output: its class, what that is in English if known."""
    imagenet = ImageNetInfo("imagenet-1k").label_descriptions(as_dict=True)
    names, origin = info.class_names, args.checkpoint or args.onnx
    if args.class_map:
        names, origin = read_class_map(args.class_map), f"--class-map {args.class_map}"
    elif not names and outputs == len(imagenet):
        names = list(imagenet)
        print(f"note    {origin} does not say what its {outputs} outputs stand for: ImageNet-1K's "
              "classes are taken", file=sys.stderr)  # fmt: skip
    names = list(names or ())
    outputs_of((), names, outputs, origin=origin)  # refuses more names than outputs
    names += map(str, range(len(names), outputs))
    if set(names) <= set(imagenet):
        return [{"class": n, "description": imagenet[n], "output": i} for i, n in enumerate(names)]
    return [{"class": name, "output": index} for index, name in enumerate(names)]


@torch.no_grad()
def _classify(
    args: argparse.Namespace,
    network: Network,
    info: NetworkInfo,
    batches: Iterable[tuple[list[str], Tensor]],
    counts: Counter[str],
) -> Iterator[Row]:
    """A row for each photograph; `counts` says how many, and how many are changed or have none."""
    labels: list[Row] = []
    for read, pixels in batches:
        images = info.prepare(pixels)
        views = (images, images.flip(-1)) if args.mirror_check else (images,)
        try:
            logits = [network(view) for view in views]
        except RuntimeError as error:
            raise UserError(f"the network cannot take {len(images)} images at once: "
                            f"{one_line(error)[:300]}") from error  # fmt: skip
        labels = labels or _labels(args, info, logits[0].shape[1])
        finite = torch.stack([each.isfinite().all(1) for each in logits]).all(0)
        counts["not finite"] += int((~finite).sum())
        values, places = logits[0].softmax(1).topk(min(args.topk, len(labels)))
        for index, path in enumerate(read):
            if not finite[index]:
                continue
            found = zip(places[index].tolist(), values[index].tolist(), strict=True)
            predictions = [labels[place] | {"probability": value} for place, value in found]
            row: Row = {"file": path, "predictions": predictions}
            if args.mirror_check:
                row["mirrored"] = labels[int(logits[1][index].argmax())]["class"]
                row["same"] = row["mirrored"] == predictions[0]["class"]
                counts["changed"] += not row["same"]
            counts["classified"] += 1
            yield row


def _print(rows: Iterable[Row]) -> None:
    """Print each row as it comes."""
    for row in rows:
        predictions = (
            f"{' '.join(p[key] for key in ('class', 'description') if key in p)} "
            f"{p['probability']:.4f}"
            for p in row["predictions"]
        )
        print(f"{_shown(row['file'])}  {'  '.join(predictions)}", flush=True)


def _write(path: Path, rows: Iterator[Row]) -> None:
    """Write each row as it comes, as JSON or into a table. Without any row there is no file."""
    first = next(rows, None)
    if first is None:
        return
    # names of files may have bytes that are no UTF-8
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        table = csv.DictWriter(file, list(_columns(first)))
        as_json = path.suffix.lower() == ".jsonl"
        if not as_json:
            table.writeheader()
        for row in chain([first], rows):
            if as_json:
                file.write(json.dumps(row) + "\n")
            else:
                table.writerow(_columns(row))


def _columns(row: Row) -> Row:
    """A row as a line of a table: class_1, probability_1, class_2 and so on."""
    found = {
        f"{key}_{number}": value
        for number, prediction in enumerate(row["predictions"], 1)
        for key, value in prediction.items()
        if key != "output"
    }
    more = {key: row[key] for key in ("mirrored", "same") if key in row}
    return {"file": row["file"], **found, **more}


def command(argv: Sequence[str] | None = None) -> int:
    """Carry out a command line (default: this process's own); returns the exit status."""
    return run_command(partial(main, argv))


if __name__ == "__main__":
    sys.exit(command())
