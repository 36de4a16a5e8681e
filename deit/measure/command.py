"""`calculate_complexity.py`: count, measure, report."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deit.measure.bench_model import Settings, prepare_compiler, release
from deit.measure.hardware import describe, versions
from deit.measure.measure import DEFAULT_BATCH, Result, count, measure
from deit.measure.networks import Comparison, comparisons, select
from deit.measure.options import make_settings, parse_args
from deit.measure.plan import about, estimate
from deit.measure.plot import draw
from deit.measure.profiling import profile
from deit.measure.roofline import PeakRates, measure_peak_rates
from deit.measure.tables import Overview, as_csv, as_json, print_comparisons
from deit.models.published import PUBLISHED
from deit.saving import write_text

__all__ = ["main"]

SMALL_SIZES = ("S", "T12", "S24")
# A terminal's own width where there is one; in a file no column is ever cut.
FILE_WIDTH = 120


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    settings = make_settings(args)
    names = select(args.models) if args.models else default_names(args, settings.device)
    compared = comparisons(names, folded=args.fold)
    names = [name for members in compared for name in members]
    # Where both go to one terminal, rows and the bar need one console.
    console = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
    report = _settings_report(args, settings)
    overview = Overview(console, names, timed=args.throughput, trained=args.train)
    results: dict[str, Result] = {}
    with _Progress(console, len(names) * (2 if args.throughput else 1)) as progress:
        if not args.throughput:
            _print_settings(report, console)
            overview.print_head()
        for name in names:
            progress.show(f"{name}: counting")
            results[name] = count(name, settings)
            progress.step()
            if not args.throughput:
                overview.print_row(results[name])
        if args.throughput:
            _measure_all(compared, results, settings, args, report, overview, console, progress)
    print_comparisons(results, console)
    for name, result in results.items():
        if args.profile and result.batch_size is not None:
            for title, table in profile(name, result.batch_size, settings):
                console.print(f"\n{title}", style="bold", highlight=False, soft_wrap=True)
                print(table, flush=True)
            release(settings.device)
    _write(args, results, report)
    if args.plot is not None:
        draw(results, args.plot, _where(report))
    return 0


def _measure_all(
    compared: Sequence[Comparison],
    results: Mapping[str, Result],
    settings: Settings,
    args: Namespace,
    report: dict[str, Any],
    overview: Overview,
    console: Console,
    progress: _Progress,
) -> None:
    """Time all networks, with their rows as they come and an estimate of what is left."""
    prepare_compiler()
    rates = measure_peak_rates(settings.device, settings.dtype)
    report["ceilings"] = {
        "tflop_per_s": rates.flops_per_s / 1e12,
        "gb_per_s": rates.bytes_per_s / 1e9,
    }
    _print_settings(report, console, rates)
    groups = [[results[name] for name in members] for members in compared]
    estimates = [estimate(members, settings, rates) for members in groups]
    text = plan_text(len(results), estimates, default=not args.models)
    _print_line("plan", text, console)
    overview.print_head()
    start = time.monotonic()
    for done, members in enumerate(groups, 1):
        measure(members, settings, rates, progress.show)
        for result in members:
            overview.print_row(result)
            progress.step()
        _write(args, results, report)
        left = seconds_left(estimates, done, time.monotonic() - start)
        if left > 0:
            progress.show(f"{about(left)} left")


def plan_text(networks: int, estimates: Sequence[tuple[float, float]], *, default: bool) -> str:
    """Networks and time in words; `default` if the networks were not named."""
    timing, compiling = map(sum, zip(*estimates, strict=True))
    groups = len(estimates)
    text = f"{networks} networks in {groups} {'groups' if groups > 1 else 'group'}, "
    text += about(timing + compiling)
    if compiling:
        text += f", of which compiling takes {about(compiling)}"
    if default and networks < len(PUBLISHED):
        text += (
            f"; these are the small ones of the {len(PUBLISHED)} published networks: "
            "name others by --models, or all of ours by --models '*'"
        )
    return text


def seconds_left(estimates: Sequence[tuple[float, float]], done: int, elapsed: float) -> float:
    """Of all comparisons behind the first `done`, at the pace of those."""
    planned = [sum(pair) for pair in estimates]
    return elapsed / sum(planned[:done]) * sum(planned[done:])


def default_names(args: Namespace, device: torch.device) -> list[str]:
    """The published networks; to be timed on a CPU, the small ones of each family."""
    small = args.throughput and device.type == "cpu"
    return [row.name for row in PUBLISHED if not small or row.size in SMALL_SIZES]


def _write(args: Namespace, results: Mapping[str, Result], report: Mapping[str, Any]) -> None:
    """The files, after each comparison again: what is measured survives an interruption."""
    if args.json is not None:
        write_text(args.json, as_json(results, report))
    if args.csv is not None:
        write_text(args.csv, as_csv(results))


def _settings_report(args: Namespace, settings: Settings) -> dict[str, Any]:
    return {
        "device": str(settings.device),
        "device_name": describe(settings.device),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "amp": settings.amp,
        "compile": args.compile,
        "compile_mode": settings.compile_mode,
        "compile_blocks": settings.compile_blocks,
        "fused_attention": True,
        "throughput": args.throughput,
        "train": settings.train,
        "batch_size": args.batch_size or DEFAULT_BATCH,
        "img_size": settings.img_size,
        "symmetrized_asym_feats": args.symmetrized_asym_feats,
        "arguments": dict(args.arguments),
        "min_time": args.min_time,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": versions(),
        "ceilings": None,
    }


def _print_settings(
    report: Mapping[str, Any], console: Console, rates: PeakRates | None = None
) -> None:
    _print_line("device", report["device_name"], console)
    if rates is not None:
        text = (
            f"{rates.flops_per_s / 1e12:,.2f} TFLOP/s {report['dtype']} matrix products, "
            f"{rates.bytes_per_s / 1e9:,.0f} GB/s copying"
        )
        _print_line("peaks", text, console)
    found = [f"{name} {version}" for name, version in report["versions"].items() if version]
    _print_line("versions", ", ".join(found), console)
    if report["throughput"]:
        blocks = ", block by block" * report["compile_blocks"]
        compiled = f"compiled ({report['compile_mode']}{blocks})"
        text = (
            f"batch {report['batch_size']}, {'autocast to ' * report['amp']}{report['dtype']}, "
            f"{compiled if report['compile'] else 'not compiled'}, fused attention, "
            f"at least {report['min_time']:g} s a network, twins in turns; medians"
        )
        _print_line("settings", text, console)


def _print_line(label: str, text: str, console: Console) -> None:
    console.print(f"{label:9} {text}", soft_wrap=True, highlight=False, markup=False)


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
        console = console if console.is_terminal else Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn()
        super().__init__(
            *columns,
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
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
