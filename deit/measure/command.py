"""`calculate_complexity.py`: count, measure, report."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deit.cli import duration
from deit.measure import plan
from deit.measure.bench_model import prepare_compiler, release
from deit.measure.hardware import describe, versions
from deit.measure.measure import DEFAULT_BATCH, Result, count, measure
from deit.measure.networks import comparisons, select
from deit.measure.options import parse_args
from deit.measure.plot import draw
from deit.measure.profiling import profile
from deit.measure.roofline import PeakRates, measure_peak_rates
from deit.measure.tables import COLUMNS, as_csv, as_json, print_comparisons, print_table
from deit.models.published import PUBLISHED
from deit.saving import write_text
from deit.train.args import parse_args as training_options
from deit.train.build import set_precision

SMALL_SIZES = ("S", "T12", "S24")
# A terminal's own width where there is one; in a file no column is ever cut.
FILE_WIDTH = 120


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    training = training_options([])  # TF32 and cudnn as training has them by default
    training.threads = args.threads
    set_precision(training, args.device)
    named = select(args.models) if args.models else default_names(args)
    groups = comparisons(named, folded=args.fold)
    names = [name for members in groups for name in members]
    # Where both go to one terminal, rows and the bar need one console.
    console = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
    report, results = _settings(args), dict[str, Result]()
    with _Progress(console, len(names) * (2 if args.throughput else 1)) as progress:
        for name in names:
            progress.show(f"{name}: counting")
            results[name] = count(name, args)
            progress.step()
        rows: Iterable[Result] = results.values()
        columns = {"params", "gflops"}
        if args.throughput:
            rates = measure_peak_rates(args.device, args.dtype)
            report["ceilings"] = {
                "tflop_per_s": rates.flops_per_s / 1e12,
                "gb_per_s": rates.bytes_per_s / 1e9,
            }
            counted = [[results[name] for name in members] for members in groups]
            seconds = [plan.estimate(members, args, rates) for members in counted]
            rows = _measured(counted, seconds, args, rates, progress, results, report)
            columns |= {"images_per_s", "peak_memory_mb"}
            columns |= {"train_images_per_s"} if args.train else set()
        head = _head(report)
        if args.throughput:
            head["plan"] = plan.describe(len(names), seconds, default=not args.models)
        for label, text in head.items():
            console.print(f"{label:9} {text}", soft_wrap=True, highlight=False, markup=False)
        print_table(rows, names, [c for name, c in COLUMNS.items() if name in columns], console)
    print_comparisons(results, console)
    for name, result in results.items():
        if args.profile and result.batch_size is not None:
            for title, table in profile(name, result.batch_size, args):
                console.print(f"\n{title}", style="bold", highlight=False, soft_wrap=True)
                print(table, flush=True)
            release()
    _write(args, results, report)
    if args.plot is not None:
        draw(results, args.plot, _where(report))
    return 0


def default_names(args: Namespace) -> list[str]:
    """The published networks; to be timed on a CPU, the small ones of each family."""
    small = args.throughput and args.device.type == "cpu"
    return [row.name for row in PUBLISHED if not small or row.size in SMALL_SIZES]


def _measured(
    groups: Sequence[Sequence[Result]],
    seconds: Sequence[plan.Estimate],
    args: Namespace,
    rates: PeakRates,
    progress: _Progress,
    results: Mapping[str, Result],
    report: Mapping[str, Any],
) -> Iterator[Result]:
    """Time all networks, with an estimate of what is left; write the files after each group."""
    prepare_compiler()
    start = time.monotonic()
    for done, members in enumerate(groups, 1):
        measure(members, args, rates, progress.show)
        for result in members:
            yield result
            progress.step()
        _write(args, results, report)
        left = plan.seconds_left(seconds, done, time.monotonic() - start)
        if left > 0:
            progress.show(f"about {duration(left)} left")


def _write(args: Namespace, results: Mapping[str, Result], report: Mapping[str, Any]) -> None:
    """The files, after each comparison again: what is measured survives an interruption."""
    if args.json is not None:
        write_text(args.json, as_json(results, report))
    if args.csv is not None:
        write_text(args.csv, as_csv(results))


def _settings(args: Namespace) -> dict[str, Any]:
    """What the numbers depend on, as JSON has it."""
    return {
        "device": str(args.device),
        "device_name": describe(args.device),
        "dtype": str(args.dtype).removeprefix("torch."),
        "amp": args.amp,
        "compile": args.compile,
        "compile_mode": args.compile_mode if args.compile else None,
        "compile_blocks": args.compile_blocks,
        "fused_attention": True,
        "throughput": args.throughput,
        "train": args.train,
        "batch_size": args.batch_size or DEFAULT_BATCH,
        "img_size": args.img_size,
        "symmetrized_asym_feats": args.symmetrized_asym_feats,
        "arguments": args.arguments,
        "min_time": args.min_time,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": versions(),
        "ceilings": None,
    }


def _head(report: Mapping[str, Any]) -> dict[str, str]:
    """Labels and texts of the head of the output."""
    lines = {"device": report["device_name"]}
    if rates := report["ceilings"]:
        lines["peaks"] = (
            f"{rates['tflop_per_s']:,.2f} TFLOP/s {report['dtype']} matrix products, "
            f"{rates['gb_per_s']:,.0f} GB/s copying"
        )
    found = [f"{name} {version}" for name, version in report["versions"].items() if version]
    lines["versions"] = ", ".join(found)
    if report["throughput"]:
        blocks = ", block by block" * report["compile_blocks"]
        compiled = f"compiled ({report['compile_mode']}{blocks})"
        lines["settings"] = (
            f"batch {report['batch_size']}, {'autocast to ' * report['amp']}{report['dtype']}, "
            f"{compiled if report['compile'] else 'not compiled'}, fused attention, "
            f"at least {report['min_time']:g} s a network, twins in turns; medians"
        )
    return lines


def _where(report: Mapping[str, Any]) -> str:
    """Device and settings of the throughput, for the title of the figure."""
    if not report["throughput"]:
        return ""
    compiled = "compiled" if report["compile"] else "not compiled"
    dtype = report["dtype"] + " autocast" * report["amp"]
    return f"{report['device_name']}; {dtype}, {compiled}"


class _Progress(Progress):
    """A bar on a terminal; elsewhere lines on stderr, one for each step as it is begun."""

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
            TimeElapsedColumn(), console=console if console.is_terminal else Console(stderr=True),
            transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task, self._said = self.add_task("", total=total), set[str]()

    def show(self, text: str) -> None:
        """Say what is done now."""
        self.update(self._task, description=text)
        if self.disable and text not in self._said:
            print(text, file=sys.stderr, flush=True)
        self._said.add(text)

    def step(self) -> None:
        """One more is done."""
        self.advance(self._task)
