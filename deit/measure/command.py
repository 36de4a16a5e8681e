"""The command line of `calculate_complexity.py`: parse, count, measure, report."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from timm.layers import to_2tuple

from deit.cli import (
    CommandLine,
    OptionGroup,
    add_compile,
    add_kernels,
    key_value,
    number,
    output_file,
)
from deit.errors import UserError
from deit.measure.hardware import describe, measure_ceilings, versions
from deit.measure.measure import DEFAULT_BATCH, Result, add_bounds, count, measure_group
from deit.measure.networks import fold_too, groups, select
from deit.measure.plan import Plan, about
from deit.measure.plot import FORMATS, draw
from deit.measure.profiling import print_profile, profile
from deit.measure.published import PUBLISHED
from deit.measure.roofline import Ceilings
from deit.measure.subject import Settings, prepare_compiler, release
from deit.measure.tables import Overview, as_csv, as_json, print_comparisons
from deit.saving import write_text
from deit.train.args import parse_args as training_options
from deit.train.build import model_arguments, set_precision
from deit.train.checkpoint import read_checkpoint
from deit.train.distributed import choose_device
from deit.train.loading import build_as_trained

__all__ = ["main", "parse_args"]

DESCRIPTION = """Parameters, FLOPs, throughput and memory of equivariant networks and their twins.

  python calculate_complexity.py --amp --compile              # published networks, timed
  python calculate_complexity.py --no-throughput              # seconds, on any machine
  python calculate_complexity.py --models 'd2_deit_base*' --train --json out.json"""

SMALL_SIZES = ("S", "T12", "S24")
DTYPES = ("float32", "bfloat16", "float16", "float64")
# A terminal's own width where there is one; in a file no column is ever cut.
FILE_WIDTH = 120


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The options; `dtype` and `device` are resolved.

    Raises:
        UserError: a wrong option or value.
    """
    parser = CommandLine(prog="calculate_complexity.py", description=DESCRIPTION)
    what = OptionGroup(parser, "what to measure")
    what.add(
        "--models",
        str,
        None,
        "NAME",
        "names or globs (default: the published ones; to be timed on a CPU, the small ones)",
        nargs="+",
    )
    what.add(
        "--checkpoint",
        str,
        None,
        "FILE",
        "the network in it, as it was trained, and its twin with what both know of its arguments",
    )
    what.add(
        "--model-kwargs",
        key_value,
        None,
        "KEY=VALUE",
        "arguments of the networks, in place of those in --checkpoint; a network that does not "
        "know one goes without it",
        nargs="+",
    )
    what.add("--img-size", number(int, 1), None, "N", "image size; each network's own without")
    what.switch(
        "--symmetrized-asym-feats",
        "classify with the absolute values of antisymmetric features too, where there are any",
    )
    what.switch("--fold", "time the folded form of each equivariant network beside it")
    what.switch("--throughput", "measure throughput and memory", default=True)
    what.switch("--train", "measure training steps too: forward, backward, AdamW")
    what.switch("--profile", "show where the time of each network goes")
    how = OptionGroup(parser, "how to run")
    how.add("--device", str, "auto", "NAME", "auto, cpu, cuda, cuda:N or mps")
    how.add(
        "--dtype",
        str,
        None,
        "NAME",
        f"{', '.join(DTYPES)} (default: float32, with --amp bfloat16)",
        choices=DTYPES,
    )
    how.switch("--amp", "keep weights in float32 and let autocast choose --dtype where it may")
    add_compile(how, "compile the networks with torch.compile")
    how.add(
        "--batch-size",
        number(int, 1),
        None,
        "N",
        f"images a step (default: {DEFAULT_BATCH}, on a CPU fewer if that takes long); reduced "
        "where memory does not hold it",
    )
    how.add("--min-time", number(float, 0), 1.0, "S", "seconds of measurement for each network")
    how.add("--threads", number(int, 1), None, "N", "threads of a CPU; torch's choice without")
    add_kernels(how)
    out = OptionGroup(parser, "what to write")
    out.add("--json", output_file(), None, "FILE", "settings and results")
    out.add("--csv", output_file(), None, "FILE", "the results, a line for each network")
    out.add(
        "--plot",
        output_file(*FORMATS),
        None,
        "FILE",
        "throughput gain and published accuracy over FLOPs",
    )
    args = parser.parse_args(argv)
    if args.amp and args.dtype in ("float32", "float64"):
        raise UserError(f"--amp with --dtype {args.dtype}: autocast goes to bfloat16 or float16")
    if args.fold and args.train:
        raise UserError("--fold with --train: a folded network is not trained; drop one")
    for wanted in ("train", "profile", "fold"):
        if getattr(args, wanted) and not args.throughput:
            raise UserError(f"--{wanted} measures times, which --no-throughput forbids: drop one")
    if args.checkpoint and args.models and len(args.models) > 1:
        raise UserError(f"--checkpoint holds one network, not {len(args.models)}")
    args.arguments = dict(args.model_kwargs or ())
    if args.checkpoint:
        _take_checkpoint(args)
    return args


def _take_checkpoint(args: Namespace) -> None:
    """Set the model, its arguments and the size of its images as --checkpoint has them."""
    network, options = build_as_trained(
        read_checkpoint(args.checkpoint),
        model=args.models[0] if args.models else None,
        img_size=args.img_size,
        kwargs=args.arguments,
    )
    args.arguments = model_arguments(options, network.num_classes)
    size = args.arguments.pop("img_size")
    if isinstance(size, tuple) and size[0] != size[1]:
        raise UserError(
            f"--checkpoint {args.checkpoint} is for images of {size[0]} x {size[1]} pixels: "
            "give --img-size for square ones"
        )
    args.models, args.img_size = [options.model], to_2tuple(size)[0]


def make_settings(args: Namespace) -> Settings:
    """How to run the networks. Sets threads, and TF32 and cudnn as training does by default."""
    device = choose_device(args.device)
    training = training_options([])
    training.threads = args.threads
    set_precision(training, device)
    name = args.dtype
    if name is None:
        # as in training: float16 on GPUs that only emulate bfloat16
        emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        name = ("float16" if emulated else "bfloat16") if args.amp else "float32"
    mode = args.compile_mode if args.compile else None
    return Settings(
        device,
        getattr(torch, name),
        args.amp,
        mode,
        args.compile_blocks,
        args.img_size,
        args.train,
        args.symmetrized_asym_feats,
        args.arguments,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    settings = make_settings(args)
    members = groups(
        default_names(args, settings.device) if not args.models else select(args.models)
    )
    if args.fold:
        members = [fold_too(group) for group in members]
    names = [name for group in members for name in group.names]
    # Where both go to one terminal, rows and the bar need one console.
    console = Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)
    report = _settings_report(args, settings)
    overview = Overview(console, names, timed=args.throughput, trained=args.train)
    results: dict[str, Result] = {}
    with _Progress(console, len(names) * (2 if args.throughput else 1)) as progress:
        if not args.throughput:
            _print_settings(report, None, console)
            overview.print_head()
        for name in names:
            progress.show(f"{name}: counting")
            results[name] = count(name, settings, with_products=args.throughput)
            progress.advance()
            if not args.throughput:
                overview.print_row(results[name])
        if args.throughput:
            ceilings = _measure_ceilings(settings, report)
            plan = Plan(members, results, settings, args.batch_size, args.min_time, ceilings)
            _print_settings(report, ceilings, console)
            _print_line("plan", plan.text(default=not args.models), console)
            overview.print_head()
        for group in members if args.throughput else ():
            measure_group(
                group, results, settings, args.batch_size, args.min_time, ceilings, progress.show
            )
            for name in group.names:
                add_bounds(results[name], settings.dtype, ceilings)
                overview.print_row(results[name])
                progress.advance()
            plan.finish(group)
            _write(args, results, report)
            progress.left(plan.seconds_left())
    print_comparisons(results, console)
    if args.profile:
        _print_profiles(results, settings, console)
    _write(args, results, report)
    if args.plot is not None:
        draw(results, args.plot, _where(report))
    return 0


def default_names(args: Namespace, device: torch.device) -> list[str]:
    """The published networks; to be timed on a CPU, the small ones of each family."""
    if args.throughput and device.type == "cpu":
        return [row.name for row in PUBLISHED if row.size in SMALL_SIZES]
    return [row.name for row in PUBLISHED]


def _measure_ceilings(settings: Settings, report: dict[str, Any]) -> Ceilings:
    prepare_compiler()
    ceilings = measure_ceilings(settings.device, settings.dtype)
    report["ceilings"] = {
        "tflop_per_s": ceilings.flops_per_s / 1e12,
        "gb_per_s": ceilings.bytes_per_s / 1e9,
    }
    return ceilings


def _write(args: Namespace, results: dict[str, Result], report: dict[str, Any]) -> None:
    """The files, after each group again: what is measured survives an interruption."""
    if args.json is not None:
        write_text(args.json, as_json(results, report))
    if args.csv is not None:
        write_text(args.csv, as_csv(results))


def _print_profiles(results: dict[str, Result], settings: Settings, console: Console) -> None:
    for name, result in results.items():
        if result.batch_size is not None:
            found = profile(name, result.batch_size, settings)
            print_profile(name, result.batch_size, found, console)
            release(settings.device)


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
        "symmetrized_asym_feats": settings.symmetrized_asym_feats,
        "arguments": dict(settings.arguments),
        "min_time": args.min_time,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": versions(),
        "ceilings": None,
    }


def _print_settings(report: dict[str, Any], ceilings: Ceilings | None, console: Console) -> None:
    lines = [("device", report["device_name"])]
    if ceilings is not None:
        lines.append(
            (
                "ceilings",
                f"{ceilings.flops_per_s / 1e12:,.2f} TFLOP/s {report['dtype']} matrix products, "
                f"{ceilings.bytes_per_s / 1e9:,.0f} GB/s copying",
            )
        )
    found = [f"{name} {version}" for name, version in report["versions"].items() if version]
    lines.append(("versions", ", ".join(found)))
    if report["throughput"]:
        lines.append(("settings", _settings_line(report)))
    for label, text in lines:
        _print_line(label, text, console)


def _print_line(label: str, text: str, console: Console) -> None:
    console.print(f"{label:9} {text}", soft_wrap=True, highlight=False, markup=False)


def _settings_line(report: dict[str, Any]) -> str:
    return ", ".join(
        [
            f"batch {report['batch_size']}",
            f"{'autocast to ' if report['amp'] else ''}{report['dtype']}",
            f"compiled ({report['compile_mode']}{', block by block' * report['compile_blocks']})"
            if report["compile"]
            else "not compiled",
            "fused attention",
            f"at least {report['min_time']:g} s a network, twins in turns; medians",
        ]
    )


def _where(report: dict[str, Any]) -> str:
    if not report["throughput"]:
        return ""
    name = report["device_name"]
    compiled = "compiled" if report["compile"] else "not compiled"
    return f"{name}; {report['dtype']}{' autocast' if report['amp'] else ''}, {compiled}"


class _Progress:
    """A bar on a terminal; elsewhere lines on stderr, one for each network as it is begun."""

    def __init__(self, console: Console, total: int) -> None:
        console = console if console.is_terminal else Console(stderr=True)
        self._said: set[str] = set()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, text: str) -> None:
        """Say what is done now."""
        self._bar.update(self._task, description=text)
        if self._bar.disable and text not in self._said:
            print(text, file=sys.stderr, flush=True)
        self._said.add(text)

    def left(self, seconds: float) -> None:
        """Say how long the rest will take."""
        if seconds > 0:
            self.show(f"{about(seconds)} left")

    def advance(self) -> None:
        """One more is done."""
        self._bar.advance(self._task)
