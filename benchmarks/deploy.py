"""Folded networks beside their ordinary twins: in ONNX Runtime, and in PyTorch eager and compiled.

    python benchmarks/deploy.py                                   # all, about half an hour
    python benchmarks/deploy.py --models resmlp_equi_d2_12 --runtimes onnx
    python benchmarks/deploy.py --runtimes                        # the table alone

Twin and ours are exported by the same call and run in turns in one process. Results are added to
those that `--json` holds already, each with its conditions; table and figure show all of them.
Run it on an idle machine: the load before each measurement is kept beside it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import timm
import torch

import deit.models  # noqa: F401 - registers the networks
from benchmarks.performance_page import (
    DEPLOY,
    MODELS,
    RESULTS,
    RUNTIMES,
    deploy_ratios,
    table,
    write_page,
)
from deit.cli import CommandLine, OptionGroup, number
from deit.deploy import fold
from deit.deploy.files import OnnxNetwork, write_onnx
from deit.errors import UserError, one_line_errors
from deit.measure.bench_model import prepare_compiler, release
from deit.measure.hardware import describe, versions
from deit.measure.timing import alternate
from deit.models.published import twin_of
from deit.saving import write_text

CPU = torch.device("cpu")


# fmt: off
def get_parser() -> CommandLine:
    parser = CommandLine(description=__doc__.splitlines()[0])
    group = OptionGroup(parser, "benchmark")
    group.add("--models", str, list(MODELS), "NAME", "equivariant networks with a twin", nargs="+")
    group.add("--runtimes", str, list(RUNTIMES), "NAME",
              f"what to measure, of {', '.join(RUNTIMES)}; none for the table alone",
              nargs="*", choices=tuple(RUNTIMES))
    group.add("--batch-size", number(int, 1), 8, "N", "images a step")
    group.add("--threads", number(int, 1), 2, "N", "CPU threads")
    group.add("--min-time", number(float, 0), 3.0, "S", "seconds of measurement for each network")
    group.add("--exported", Path, None, "FOLDER", "keep ONNX files here and use those that it has")
    group.add("--json", Path, RESULTS / "deploy.json", "FILE", "results")
    group.switch("--page",
                 "write docs/performance.md and its figures anew, from benchmarks/results")
    return parser
# fmt: on


@torch.no_grad()
def measure(name: str, runtime: str, args: Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of a batch for twin, original and folded network, and under what conditions.

    ONNX Runtime runs no original. It reads files in `folder`, which are written unless they are
    there.
    """
    images, onnx = torch.randn(args.batch_size, 3, 224, 224), runtime == "onnx"
    model, twin = (timm.create_model(each).eval() for each in (name, twin_of(name)))
    networks = {"twin": twin} | ({} if onnx else {"unfolded": model})
    networks["folded"] = fold(model, "onnx" if onnx else "torch")
    steps, sizes = {}, {}
    for kind, model in networks.items():
        if onnx:
            path = folder / f"{name}.{kind}.onnx"
            if not path.exists():
                write_onnx(model, images, path, {}, dynamic=True, opset=None)
            model = OnnxNetwork(path, threads=args.threads)
            # with the weights, where they lie beside
            sizes[kind] = sum(file.stat().st_size for file in folder.glob(f"{path.name}*"))
        steps[kind] = partial(torch.compile(model) if runtime == "compiled" else model, images)
    for step in 2 * list(steps.values()):
        step()
    load = os.getloadavg()[0]
    timings = alternate(steps, CPU, args.min_time)
    return {
        "seconds": {kind: timing.median for kind, timing in timings.items()},
        "spread": {kind: timing.spread for kind, timing in timings.items()},
        "bytes": sizes,
        "batch_size": args.batch_size,
        "threads": args.threads,
        "load": load,
        "device": describe(CPU),
        "versions": versions("onnx", "onnxruntime"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if alone := [name for name in args.models if twin_of(name) is None]:
        raise UserError(f"{alone[0]!r} has no ordinary twin: name an equivariant network")
    torch.set_num_threads(args.threads)
    prepare_compiler()
    known = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.exported or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.models if args.runtimes else ():
            for runtime in args.runtimes:
                result = measure(name, runtime, args, folder)
                known.setdefault(name, {})[runtime] = result
                write_text(args.json, json.dumps(known, indent=1) + "\n")
                milliseconds = {k: f"{1000 * v:.0f} ms" for k, v in result["seconds"].items()}
                ratio = deploy_ratios(known)[1][name][RUNTIMES[runtime]]
                print(f"{name} {runtime}: {milliseconds}, ratio {ratio:.2f}", flush=True)
                release()
    if known:
        conditions, found = deploy_ratios(known)
        print(f"\n{conditions}\n\n{table(found, DEPLOY)}")
    if args.page:
        write_page()
    return 0


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
