"""Where the gain on a CPU comes from: networks and their ordinary twins, each with its variants.

    python benchmarks/cpu_report.py                                # eager, batch 8
    python benchmarks/cpu_report.py --compile --models d2_deit_base_patch16_LS

ours            as a user gets it: fused paths where they apply
ours, plain     the layers' plain formulas: PyTorch's own products, MKL's in float32
twin            the ordinary network, as a user gets it
twin, oneDNN    the same with its products in oneDNN: each linear layer calls what our fused paths
                call

The last one tells the part of the gain that is due to another library's products from the part that
is due to fewer of them. All four are timed in turns; ratios are of median times, above one where
ours is faster.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

import deit.models  # noqa: F401 - registers the networks
from deit import kernels
from deit.cli import CommandLine, OptionGroup, number
from deit.complexity.hardware import describe, versions
from deit.complexity.published import twin_of
from deit.complexity.subject import Settings, Subject, prepare_compiler, release
from deit.complexity.timing import alternate
from deit.errors import UserError, one_line_errors
from deit.kernels.cpu import AVAILABLE, product
from deit.saving import write_text

MODELS = (
    "d2_deit_small_patch16_LS",
    "d2_deit_base_patch16_LS",
    "d2_convnext_isotropic_small",
    "d2_convnext_isotropic_base",
    "resmlp_equi_d2_12",
    "resmlp_equi_d2_B_24",
)
VARIANTS = ("ours", "ours, plain", "twin", "twin, oneDNN")


def get_parser() -> CommandLine:
    parser = CommandLine(description=__doc__.splitlines()[0])
    group = OptionGroup(parser, "report")
    group.add("--models", str, list(MODELS), "NAME", "equivariant networks with a twin", nargs="+")
    group.switch("--compile", "compile all variants with torch.compile")
    group.add("--batch-size", number(int, 1), 8, "N", "images a step")
    group.add("--threads", number(int, 1), 2, "N", "CPU threads")
    group.add("--min-time", number(float, 0), 3.0, "S", "seconds of measurement for each variant")
    group.add("--json", Path, None, "FILE", "settings and results")
    return parser


@torch.library.custom_op(
    "deit_benchmark::linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
def operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


@operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by oneDNN."""
    return operator(x, weight, bias)


def context(variant: str) -> AbstractContextManager:
    """What is in force while a variant is compiled and while it runs."""
    if variant == "ours, plain":
        return kernels.plain()
    if variant == "twin, oneDNN":
        return mock.patch("torch.nn.functional.linear", linear)
    return nullcontext()


def step(subject: Subject, variant: str) -> Callable[[], object]:
    def run() -> None:
        with context(variant):
            subject.infer()

    return run


def measure(name: str, batch: int, settings: Settings, min_time: float) -> dict[str, float]:
    """Seconds of a batch for each variant of a network and its twin."""
    steps = {}
    for variant in VARIANTS:
        subject = Subject(name if "ours" in variant else twin_of(name), batch, settings)
        subject.model.eval()
        steps[variant] = step(subject, variant)
        steps[variant]()
        steps[variant]()
    timings = alternate(steps, settings.device, min_time)
    return {variant: timing.median for variant, timing in timings.items()}


def main(argv: Sequence[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if not AVAILABLE:
        raise UserError("this PyTorch was built without oneDNN: there is nothing to compare")
    for name in args.models:
        if twin_of(name) is None:
            raise UserError(f"{name!r} has no ordinary twin: name an equivariant network")
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    settings = Settings(device, compile_mode="default" if args.compile else None)
    prepare_compiler()
    report = {
        "device": describe(device),
        "threads": args.threads,
        "versions": versions(),
        "compile": args.compile,
        "batch_size": args.batch_size,
        "min_time": args.min_time,
        "seconds": {},
    }
    mode = "compiled" if args.compile else "eager"
    print(f"{report['device']}, {args.threads} threads, torch {torch.__version__}, float32, {mode}")
    print(f"batch {args.batch_size}; ratios of the twin's time to ours\n")
    print(f"{'network':32} {'ms':>8}  fused/twin  fused/twin, oneDNN  plain/twin")
    for name in args.models:
        seconds = measure(name, args.batch_size, settings, args.min_time)
        report["seconds"][name] = seconds
        ours, plain, twin, packed = (seconds[variant] for variant in VARIANTS)
        print(
            f"{name:32} {1000 * ours:8.1f}  {twin / ours:10.2f}  {packed / ours:18.2f}  "
            f"{twin / plain:10.2f}",
            flush=True,
        )
        release(device)
    if args.json is not None:
        write_text(args.json, json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
