"""`python test_equivariance.py`: check layers and networks, print tables, say whether all held."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import timm
import torch
from rich.console import Console
from torch import nn

from deit.cli import CommandLine, OptionGroup, add_compile, add_kernels, key_value, number
from deit.equivariance import tolerance_of, worst
from deit.errors import UserError, one_line
from deit.train.distributed import choose_device
from deit.train.options import device_name
from deit.verify import layers, mutations, networks
from deit.verify.check import DTYPES, Case, Result, Settings, check
from deit.verify.samples import CANDIDATES

DESCRIPTION = """\
Check that layers and networks are equivariant under flopping (mirroring left to right).

With random parameters, on natural and random images: every layer, its gradients, every feature
inside each network, the maps it hands out, its logits. Errors are relative to the feature's norm.
Exit code 0 if everything held, 1 if a check failed, 2 for wrong input.
"""
MOST_FAILURES = 3  # are listed of a row
Row = tuple[list[Any], list[str]]  # cells, and what fails


def get_parser() -> CommandLine:
    """The options of the script."""
    parser = CommandLine(prog="test_equivariance.py", description=DESCRIPTION)
    what = OptionGroup(parser, "what to check")
    what.add("--model", str, None, "NAME",
             "networks, by name or glob, such as 'd2_deit_*' (default: the smallest of each "
             "family, also with its options)", nargs="+")  # fmt: skip
    what.add("--checkpoint", str, None, "FILE",
             "check the trained weights in it (not their average), in the network that it was "
             "trained as: a file, an address or hf-hub:owner/name")  # fmt: skip
    what.add("--model-kwargs", key_value, None, "KEY=VALUE",
             "with --checkpoint: arguments of the network other than those that it was trained "
             "with", nargs="+")  # fmt: skip
    what.switch("--self-test", "check the checks instead: break each kind of layer in turn, and "
                "require that each break is found and located")  # fmt: skip
    how = OptionGroup(parser, "how")
    how.add("--device", device_name, "auto", "DEVICE", "auto, cpu, cuda, cuda:N or mps")
    how.add("--dtype", str, None, "DTYPE",
            f"one or more of {', '.join(DTYPES)} (default: all, and mixed precision; with --amp, "
            "--compile or --checkpoint float32)", nargs="+", choices=tuple(DTYPES))  # fmt: skip
    how.switch("--amp", "automatic mixed precision")
    add_compile(how, "check what torch.compile makes of layers and networks too (minutes)")
    how.add("--batch", number(int, 2, CANDIDATES), 2, "N",
            "natural images, and as many random ones")  # fmt: skip
    how.add("--img-size", number(int, 1), None, "N",
            f"height and width of images (default: {networks.SIZE}, or what a checkpoint was "
            "trained on)")  # fmt: skip
    how.add("--seed", number(int, 0, 10**18), 0, "N", "of parameters and random images")
    add_kernels(how)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; returns the exit code.

    Raises:
        UserError: for wrong input.
    """
    args = get_parser().parse_args(argv)
    settings = _settings(args)
    start = time.monotonic()
    # TF32 would round to ten bits what is called float32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cases = [] if args.self_test else _networks(args)
    _print_header(settings)
    if args.self_test:
        counts = [_self_test(each) for each in settings]
    else:
        counts = [_check_layers(settings), _check_networks(args, cases, settings)]
    rows, failed = map(sum, zip(*counts, strict=True))
    verdict = f"{failed} of {rows} checks FAILED" if failed else f"all {rows} checks held"
    print(f"\n{verdict} ({time.monotonic() - start:.0f} s)")
    return 1 if failed else 0


def _settings(args: argparse.Namespace) -> list[Settings]:
    """One for each dtype."""
    if args.self_test and (args.model or args.checkpoint or args.compile):
        raise UserError("--self-test breaks networks of its own: omit --model, --checkpoint and "
                        "--compile")  # fmt: skip
    if args.amp and args.dtype not in (None, ["float32"]):
        raise UserError(f"--amp keeps parameters in float32: omit --dtype {args.dtype[0]}")
    if args.checkpoint and args.model and len(args.model) > 1:
        raise UserError(f"--checkpoint holds one network, not {len(args.model)}: give one --model")
    if args.model_kwargs and not args.checkpoint:
        raise UserError("--model-kwargs is for the network of a --checkpoint, which is not given")
    common = Settings(
        torch.float32,
        choose_device(args.device),
        args.batch,
        args.seed,
        args.amp,
        args.compile_mode if args.compile else None,
        args.compile_blocks,
    )
    if args.dtype:
        return [replace(common, dtype=DTYPES[name]) for name in dict.fromkeys(args.dtype)]
    if args.amp or args.compile or args.checkpoint:
        return [common]
    return [*(replace(common, dtype=d) for d in DTYPES.values()), replace(common, amp=True)]


def _networks(args: argparse.Namespace) -> list[Case]:
    if args.checkpoint:
        name = args.model[0] if args.model else None
        kwargs = dict(args.model_kwargs or ())
        return [networks.network_of(args.checkpoint, name, args.img_size, kwargs)]
    size = args.img_size or networks.SIZE
    if args.model:
        cases = [networks.network_case(name, size=size) for name in networks.choose(args.model)]
    else:
        cases = networks.default_networks(size)
    with torch.device("meta"):  # complain about a size now, not after minutes
        for case in cases:
            case.build()
    return cases


def _print_header(settings: list[Settings]) -> None:
    first = settings[0]
    device = first.device
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu"
    print(f"device {device} ({name}), torch {torch.__version__}, timm {timm.__version__}")
    blocks = ", block by block" if first.compile_blocks else ""
    compiled = f", compiled ({first.compile_mode}{blocks})" if first.compile_mode else ""
    print(f"{first.count} natural and {first.count} random images, seed {first.seed}{compiled}")
    for each in settings:
        tolerance = tolerance_of(each.compute_dtype)
        print(f"tolerance {tolerance:.1e} of a feature's norm in {each.arithmetic}")
    print("times sqrt(blocks / 12) in networks of more than 12 blocks")


def _check_layers(settings: list[Settings]) -> tuple[int, int]:
    columns = {"layer": "<46", **dict.fromkeys((each.arithmetic for each in settings), ">8"),
               "images differ": ">13", "ordinary twin": ">13"}  # fmt: skip

    def row(case: Case) -> Row:
        results = [check(case, each) for each in settings]
        errors = [worst(result.error(), result.gradient) for result in results]
        contrast, twin = (min(map(attrgetter(name), results)) for name in ("contrast", "twin"))
        return [case, *errors, contrast, twin], _failures(*results)

    notes = ["the largest error of features, output and gradients; 'images differ': the smallest "
             "difference of features of different images"]  # fmt: skip
    rows = [(case, partial(row, case)) for case in layers.LAYER_CASES]
    return _print_table("Layers", columns, rows, notes)


def _check_networks(
    args: argparse.Namespace, cases: list[Case], settings: list[Settings]
) -> tuple[int, int]:
    columns = {"network": "<57", "arithmetic": "<12", "layers": ">6", "natural": ">7",
               "random": ">7", "worst at": "<34", "gradients": ">9", "logits": ">9",
               "images differ": ">13", "ordinary twin": ">13"}  # fmt: skip

    def row(case: Case, each: Settings) -> Row:
        found = check(case, each)
        cells = [
            case,
            each.arithmetic,
            len({event.layer for event in found.events}),
            found.error(slice(None, each.count)),
            found.error(slice(each.count, None)),
            found.worst,
            found.gradient,
            found.output if found.promised else f"({found.output:.1e})",
            found.contrast,
            found.twin,
        ]
        return cells, _failures(found)

    notes = ["natural, random: the largest error of a feature on these images; ordinary twin: its "
             "error in the logits"]  # fmt: skip
    if any(case.name.startswith("hybrid_") for case in cases):
        notes.append("(logits) of a hybrid are not promised: it is equivariant up to its bridge, "
                     "and its features are checked so far")  # fmt: skip
    # by default a large network is checked without the slow float64, and without AMP
    quick = [each for each in settings if each.dtype != torch.float64 and not each.amp]
    rows = [
        (case, partial(row, case, each))
        for case in cases
        for each in (settings if args.dtype or len(settings) == 1 or case.variant else quick)
    ]
    return _print_table("Networks", columns, rows, notes)


def _failures(*results: Result) -> list[str]:
    """What fails, in which arithmetic."""
    return [f"{r.settings.arithmetic}: {text}" for r in results for text in r.failures]


def _self_test(settings: Settings) -> tuple[int, int]:
    columns = {"broken": "<22", "how": "<50", "where": "<28", "found": "<47", "error": ">8"}

    def intact(case: Case) -> Row:
        event = check(case, settings, features_only=True).culprit
        wrong = [] if event is None else [f"{event} fails although nothing is broken"]
        return ["nothing", case, "-", event or "nothing", None], wrong

    def broken(mutation: mutations.Mutation) -> Row:
        kind = "network" if mutation.kind is nn.Module else mutation.kind.__name__
        where = mutation.where or ("network" if mutation.case.is_network else mutation.case)
        found, error, wrong = mutations.find(mutation, settings)
        row = [kind, mutation.what, where, found, error]
        return row, [f"{mutation.what}: {text}" for text in wrong]

    rows = [(case, partial(intact, case)) for case in mutations.INTACT]
    rows += [(each, partial(broken, each)) for each in mutations.MUTATIONS]
    return _print_table(f"Self-test in {settings.arithmetic}", columns, rows)


def _print_table(
    title: str,
    columns: dict[str, str],
    rows: Iterable[tuple[Any, Callable[[], Row]]],
    notes: Sequence[str] = (),
) -> tuple[int, int]:
    """Print rows as they come, each with a verdict, which is coloured in a terminal; then failures.

    Args:
        columns: titles, and the alignment and width of each.
        rows: names and checks. A check that crashes is a failure like others.

    Returns:
        The number of rows, and of those with failures.
    """
    # soft_wrap: a pipe or a file can take a line whole
    console = Console(highlight=False, markup=False, soft_wrap=True)
    titles = "  ".join(f"{name:{width}}" for name, width in columns.items())
    console.print(f"\n{title}\n\n{titles.rstrip()}")
    count = failed = 0
    listed = list(notes)
    for name, run in rows:
        try:
            cells, failures = run()
        except UserError:
            raise
        except Exception as error:
            cells = [name, *[None] * (len(columns) - 1)]
            failures = [f"{type(error).__name__}: {one_line(error)}"]
        shown = [_shown(cell) for cell in cells]
        line = "  ".join(f"{c:{w}}" for c, w in zip(shown, columns.values(), strict=True))
        console.print(line, end="  ")
        console.print("FAILED" if failures else "ok", style="red" if failures else "green")
        count, failed = count + 1, failed + bool(failures)
        listed += [f"FAILED: {shown[0]}: {failure}" for failure in failures[:MOST_FAILURES]]
        if len(failures) > MOST_FAILURES:
            listed.append(f"FAILED: {shown[0]}: and {len(failures) - MOST_FAILURES} more")
    for line in listed:
        console.print(line)
    return count, failed


def _shown(value: Any) -> str:
    """A cell: relative errors with two digits, a dash for none."""
    return "-" if value is None else f"{value:.1e}" if isinstance(value, float) else str(value)
