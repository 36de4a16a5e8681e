"""`python test_equivariance.py`: check layers and networks, print tables, say whether all held."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import timm
import torch
from torch import nn

from deit.cli import CommandLine, OptionGroup, add_compile, add_kernels, key_value, number
from deit.equivariance import worst
from deit.errors import UserError, one_line
from deit.verify import mutations
from deit.verify.check import Case, Result, check
from deit.verify.checkpoints import network_of
from deit.verify.layers import LAYER_CASES
from deit.verify.networks import DEFAULT, NetworkCase, choose
from deit.verify.report import Column, Table, shown
from deit.verify.samples import CANDIDATES
from deit.verify.settings import DTYPES, Settings

__all__ = ["get_parser", "main"]

DESCRIPTION = """\
Check that layers and networks are equivariant under flopping (mirroring left to right).

With random parameters, on natural and random images: every layer, its gradients, every feature
inside each network, the maps it hands out, its logits. Errors are relative to the feature's norm.
Exit code 0 if everything held, 1 if a check failed, 2 for wrong input.
"""
SIZE = 224


def get_parser() -> CommandLine:
    """The options of the script."""
    parser = CommandLine(prog="test_equivariance.py", description=DESCRIPTION)
    what = OptionGroup(parser, "what to check")
    what.add(
        "--model", str, None, "NAME",
        "networks, by name or glob, such as 'd2_deit_*' (default: the smallest of each family, "
        "also with its options)", nargs="+",
    )  # fmt: skip
    what.add(
        "--checkpoint", str, None, "FILE",
        "check the trained weights in it (not their average), in the network that it was trained "
        "as: a file, an address or hf-hub:owner/name",
    )  # fmt: skip
    what.add(
        "--model-kwargs", key_value, None, "KEY=VALUE",
        "with --checkpoint: arguments of the network other than those that it was trained with",
        nargs="+",
    )  # fmt: skip
    what.switch(
        "--self-test",
        "check the checks instead: break each kind of layer in turn, and require that each break "
        "is found and located",
    )
    how = OptionGroup(parser, "how")
    how.add(
        "--device", str, None, "DEVICE",
        "such as cpu, cuda or cuda:1 (default: cuda if there is one, else cpu)",
    )  # fmt: skip
    how.add(
        "--dtype", str, None, "DTYPE",
        f"one or more of {', '.join(DTYPES)} (default: all, and mixed precision; with --amp, "
        "--compile or --checkpoint float32)", nargs="+", choices=tuple(DTYPES),
    )  # fmt: skip
    how.switch("--amp", "automatic mixed precision")
    add_compile(how, "check what torch.compile makes of layers and networks too (minutes)")
    how.add(
        "--batch", number(int, 2, CANDIDATES), 2, "N", "natural images, and as many random ones"
    )
    how.add(
        "--img-size", number(int, 1), None, "N",
        f"height and width of images (default: {SIZE}, or what a checkpoint was trained on)",
    )  # fmt: skip
    how.add("--seed", number(int, 0), 0, "N", "of parameters and random images")
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
        tables = [_self_test(each) for each in settings]
    else:
        checks = [
            (case, each, network)
            for case, network in cases
            for each in _arithmetic(args, case, settings)
        ]
        tables = [_check_layers(settings), _check_networks(checks)]
    rows, failed = sum(t.rows for t in tables), sum(t.failed for t in tables)
    took = f"{time.monotonic() - start:.0f} s"
    if failed:
        print(f"\n{failed} of {rows} checks FAILED ({took})")
        return 1
    print(f"\nall {rows} checks held ({took})")
    return 0


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
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = one_line(error).split(". ")[0]
        raise UserError(f"the device {name!r} cannot be used: {reason}") from error
    mode = args.compile_mode if args.compile else None
    common = Settings(
        torch.float32, device, args.batch, args.seed, args.amp, mode, args.compile_blocks
    )
    if args.dtype:
        return [replace(common, dtype=DTYPES[name]) for name in dict.fromkeys(args.dtype)]
    if args.amp or args.compile or args.checkpoint:
        return [common]
    return [*(replace(common, dtype=d) for d in DTYPES.values()), replace(common, amp=True)]


def _networks(args: argparse.Namespace) -> list[tuple[NetworkCase, nn.Module | None]]:
    """The cases, with the network itself where it comes from a checkpoint."""
    if args.checkpoint:
        name = args.model[0] if args.model else None
        return [network_of(args.checkpoint, name, args.img_size, dict(args.model_kwargs or ()))]
    size = (args.img_size or SIZE,) * 2
    if args.model:
        cases = [NetworkCase(name, img_size=size) for name in choose(args.model)]
    else:  # the variants keep their own sizes, which are part of what they check
        cases = [case if case.variant else replace(case, img_size=size) for case in DEFAULT]
    with torch.device("meta"):  # complain about a size now, not after minutes
        for case in cases:
            case.build()
    return [(case, None) for case in cases]


def _arithmetic(
    args: argparse.Namespace, case: NetworkCase, settings: list[Settings]
) -> list[Settings]:
    """How to check a network: by default a large one without the slow float64, and without AMP."""
    if args.dtype or len(settings) == 1 or case.variant:
        return settings
    return [each for each in settings if each.dtype != torch.float64 and not each.amp]


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
        print(f"tolerance {each.tolerance():.1e} of a feature's norm in {each.arithmetic}")
    print("times sqrt(blocks / 12) in networks of more than 12 blocks")


def _check_layers(settings: list[Settings]) -> Table:
    columns = [
        Column("layer", 46, right=False),
        *(Column(each.arithmetic, 8) for each in settings),
        Column("images differ", 13),
        Column("ordinary twin", 13),
    ]
    notes = ["the largest error of features, output and gradients; 'images differ': the smallest "
             "difference of features of different images"]  # fmt: skip
    rows = [[(case, each, None) for each in settings] for case in LAYER_CASES]
    return _check("Layers", columns, notes, rows, _layer_cells)


def _layer_cells(results: list[Result]) -> list[str]:
    return [
        str(results[0].case),
        *(shown(worst(result.error(), result.gradient)) for result in results),
        shown(min(result.contrast for result in results)),
        shown(min(result.twin for result in results)),
    ]


def _check_networks(checks: list[tuple[NetworkCase, Settings, nn.Module | None]]) -> Table:
    columns = [
        Column("network", 57, right=False),
        Column("arithmetic", 12, right=False),
        Column("layers", 6),
        Column("natural", 7),
        Column("random", 7),
        Column("worst at", 34, right=False),
        Column("gradients", 9),
        Column("logits", 9),
        Column("images differ", 13),
        Column("ordinary twin", 13),
    ]
    notes = ["natural, random: the largest error of a feature on these images; ordinary twin: its "
             "error in the logits"]  # fmt: skip
    if any(case.name.startswith("hybrid_") for case, *_ in checks):
        notes.append("(logits) of a hybrid are not promised: it is equivariant up to its bridge, "
                     "and its features are checked so far")  # fmt: skip
    return _check("Networks", columns, notes, [[row] for row in checks], _network_cells)


def _network_cells(results: list[Result]) -> list[str]:
    (result,) = results
    logits, count = shown(result.output), result.settings.count
    return [
        str(result.case),
        result.settings.arithmetic,
        str(result.layers),
        shown(result.error(slice(None, count))),
        shown(result.error(slice(count, None))),
        str(result.worst),
        shown(result.gradient),
        logits if result.promised else f"({logits})",
        shown(result.contrast),
        shown(result.twin),
    ]


def _check(
    title: str,
    columns: list[Column],
    notes: list[str],
    rows: list[list[tuple[Case, Settings, nn.Module | None]]],
    cells: Callable[[list[Result]], list[str]],
) -> Table:
    """A table of checks; a row can have several of one case."""
    with Table(title, columns, notes) as table:
        for row in rows:
            try:
                results = [check(*each) for each in row]
            except UserError:
                raise
            except Exception as error:
                table.crash(str(row[0][0]), error)
                continue
            failures = [f"{r.settings.arithmetic}: {text}" for r in results for text in r.failures]
            table.row(cells(results), failures)
    return table


def _self_test(settings: Settings) -> Table:
    columns = [
        Column("broken", 22, right=False),
        Column("how", 50, right=False),
        Column("where", 28, right=False),
        Column("found", 47, right=False),
        Column("error", 8),
    ]
    with Table(f"Self-test in {settings.arithmetic}", columns) as table:
        for case in mutations.INTACT:
            event = mutations.intact_failure(case, settings)
            found = [] if event is None else [f"{event} fails although nothing is broken"]
            table.row(["nothing", str(case), "-", str(event or "nothing"), "-"], found)
        for each in mutations.MUTATIONS:
            result = mutations.apply_mutation(each, settings)
            kind = "network" if each.kind is nn.Module else each.kind.__name__
            where = each.where or ("network" if each.case.is_network else str(each.case))
            table.row(
                [kind, each.what, where, str(result.found or "nothing"), shown(result.error)],
                [f"{each.what}: {failure}" for failure in result.failures],
            )
    return table
