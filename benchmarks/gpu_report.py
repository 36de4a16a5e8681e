"""Everything about equivariant networks on a GPU, in one run: is it right, and is it fast?

    python benchmarks/gpu_report.py --output report      # within --minutes, 8.5 by default
    python benchmarks/gpu_report.py --rehearse           # the same at tiny sizes, on a CPU

checks      fused operations against float64, networks with fused paths against plain formulas
inference   bfloat16, compiled, batch 64: ours beside the ordinary twin, also as CUDA graphs
training    forward, backward and fused AdamW with bfloat16 autocast, batch 64; peak memory
large       inference with batch 256
plain       inference of batch 64 without fused paths

Twins are timed in turns; a ratio is the median over pairs of neighbouring samples, above one where
ours is faster. With `--compile blocks`, which takes seconds for a network where `whole` takes a
minute, every block is compiled by itself (once for all blocks), for both twins alike. What there is
no time for is skipped and named. A failure costs its own line. The tables are repeated at the end;
report.json and report.log in --output have everything.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.gpu_checks import CASES, DTYPES, check_network, check_operation
from benchmarks.gpu_timing import HEADING, Network, Options, Row, Scale, measure
from deit import kernels
from deit.cli import CommandLine, OptionGroup, number
from deit.complexity.hardware import describe, measure_ceilings, versions
from deit.complexity.subject import prepare_compiler, release
from deit.errors import UserError, one_line, one_line_errors
from deit.kernels import tuning

# The parts, and how they share the time. What one leaves is for those after it.
PARTS = {"checks": 3.0, "inference": 3.5, "training": 2.5, "large": 1.0, "plain": 0.5}
COMPILE = ("blocks", "whole", "none")
# Seconds that a job needs at least, before any of its kind has run.
FIRST_GUESS = 10.0


class Report:
    """Prints lines as they come and keeps everything in a folder, if there is one."""

    def __init__(self, folder: Path | None, minutes: float, parts: Sequence[str]) -> None:
        self._folder, self._start = folder, time.monotonic()
        self._end, total = {}, sum(PARTS[part] for part in parts)
        for i, part in enumerate(parts):
            share = sum(PARTS[other] for other in parts[: i + 1]) / total
            self._end[part] = self._start + 60 * minutes * share
        self._lines: list[str] = []
        self._longest: dict[str, float] = {}
        self.data: dict[str, Any] = {"checks": [], "rows": [], "failed": [], "skipped": []}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def line(self, text: str) -> None:
        print(text, flush=True)
        self._lines.append(text)

    def save(self) -> None:
        if self._folder is None:
            return
        texts = {
            "report.log": "\n".join(self._lines),
            "report.json": json.dumps(self.data, indent=1),
        }
        for name, text in texts.items():
            temporary = self._folder / f".{name}.{os.getpid()}"
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._folder / name)

    def attempt(self, part: str, kind: str, name: str, work: Callable[[], None]) -> None:
        """Do `work` if its part has time for the longest of its kind so far; report a failure."""
        began = time.monotonic()
        if self._end[part] - began < self._longest.get(kind, FIRST_GUESS):
            self.data["skipped"].append(f"{kind} {name}")
            return
        try:
            work()
        except Exception as error:  # the rest of the report is worth having
            text = f"FAIL {kind} {name}: {type(error).__name__}: {one_line(error)[:300]}"
            self.data["failed"].append(text)
            self.line(text)
        seconds = time.monotonic() - began
        self._longest[kind] = max(self._longest.get(kind, 0.0), seconds)
        self.data["seconds"] = round(time.monotonic() - self._start, 1)
        self.save()


def header(scale: Scale, args: Any) -> dict[str, Any]:
    """What the numbers depend on."""
    facts = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "revision": _output("git", "describe", "--always", "--dirty"),
        "device": describe(scale.device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": versions(),
        "machine": platform.platform(),
        "settings": f"compile {args.compile} by {scale.backend}, batches {scale.batch} and "
        f"{scale.large_batch}, at least {args.seconds:g} s each, kernels {kernels.get_mode()}, "
        f"inference {'under autocast' if args.autocast else 'with bfloat16 weights'}",
    }
    if scale.device.type == "cuda":
        ceilings = measure_ceilings(scale.device, torch.bfloat16)
        facts["bf16 matrix product"] = f"{ceilings.flops_per_s / 1e12:.0f} TFLOP/s"
        facts["copy"] = f"{ceilings.bytes_per_s / 1e12:.2f} TB/s, read and written"
    return facts


def _output(*command: str) -> str | None:
    """The first line that a command prints; None without it."""
    try:
        folder = Path(__file__).resolve().parent
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None


def run_checks(report: Report, scale: Scale) -> None:
    """Every operation in every dtype, then the networks; a line for each."""

    def add(check: Callable[[], Any]) -> None:
        finding = check()
        report.data["checks"].append(finding._asdict())
        report.line(str(finding))

    cases = [c for c in CASES if scale.device.type == "cuda" or not c.every]
    for case in cases:
        for dtype in DTYPES if not case.every else DTYPES[:1]:
            report.attempt(
                "checks",
                "operation",
                f"{case.name}, {dtype}",
                lambda case=case, dtype=dtype: add(
                    lambda: check_operation(case, dtype, scale.device)
                ),
            )
    batch = min(scale.batch, 16)
    for name in scale.checked:
        report.attempt(
            "checks",
            "network",
            name,
            lambda name=name: add(
                lambda: check_network(name, scale.device, batch, **scale.kwargs(name))
            ),
        )
        release(scale.device)


def run_timings(
    report: Report, scale: Scale, part: str, options: Options, patterns: Sequence[str]
) -> None:
    """A row for each network whose name fits one of `patterns`."""
    report.line(HEADING)

    def add(network: Network) -> None:
        row = measure(part, network, scale, options)
        report.data["rows"].append(asdict(row))
        report.line(str(row))

    for network in scale.networks:
        if any(fnmatchcase(network.name, pattern) for pattern in patterns):
            report.attempt(part, part, network.name, lambda network=network: add(network))


def close(report: Report, caught: list[warnings.WarningMessage]) -> None:
    """What was chosen, then everything that a reader must see."""
    decisions = [d for d in tuning.report() if d.dtype != torch.float64]  # that is the reference
    report.data["decisions"] = [
        {**d._asdict(), "dtype": str(d.dtype), "key": repr(d.key)} for d in decisions
    ]
    dropped = {
        str(w.message) for w in caught if "runs without its implementation" in str(w.message)
    }
    report.data["dropped"] = sorted(dropped)
    for d in decisions:
        others = ", ".join(f"{name} {ms:.3f}" for name, ms in d.milliseconds.items())
        dtype = str(d.dtype).removeprefix("torch.")
        report.line(f"{d.op} {d.key} {dtype}: {d.chosen}" + (f" ({others} ms)" if others else ""))
    report.line("chosen implementations (how often):")
    for op in dict.fromkeys(d.op for d in decisions):
        counts = Counter(d.chosen for d in decisions if d.op == op)
        report.line(f"  {op}: " + ", ".join(f"{name} {n}" for name, n in counts.most_common()))
    for text in report.data["dropped"][:8]:
        report.line(f"dropped: {text[:200]}")
    checks = report.data["checks"]
    failed = [check["name"] for check in checks if not check["passed"]]
    report.line(f"checks: {len(checks) - len(failed)} passed, {len(failed)} failed {failed or ''}")
    report.line(HEADING)
    for row in report.data["rows"]:
        report.line(str(Row(**row)))
    for text in report.data["failed"]:
        report.line(text)
    skipped = report.data["skipped"]
    report.line(f"skipped for lack of time: {', '.join(skipped) or 'nothing'}")
    report.line(f"{report.data.get('seconds', 0)} s")
    report.save()


def main() -> int:
    """Run the parts; 1 if a check or a measurement failed."""
    out = os.environ.get("OUT")
    parser = CommandLine(description=__doc__)
    options = OptionGroup(parser, "report")
    options.add("--minutes", number(float, low=0), 8.5, "N", "begin nothing that would take longer")
    options.add("--output", Path, None, "DIR", "for report.json and report.log (default: $OUT)")
    options.add(
        "--parts", str, tuple(PARTS), "PART", "in this order", nargs="+", choices=tuple(PARTS)
    )
    options.add("--networks", str, ("*",), "GLOB", "names of ours to time", nargs="+")
    options.add("--compile", str, "blocks", "WHAT", ", ".join(COMPILE), choices=COMPILE)
    options.add("--seconds", number(float, low=0), 1.0, "S", "shortest time for each network")
    options.switch("--autocast", "inference with float32 weights under autocast")
    options.switch("--rehearse", "tiny sizes on the CPU, to see that everything runs")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        raise UserError("there is no CUDA device: only --rehearse runs without one")

    scale = Scale.rehearsal() if args.rehearse else Scale(torch.device("cuda"))
    output = args.output or (Path(out) if out else None)
    report = Report(output, args.minutes, args.parts)
    how = Options(args.compile, args.seconds, args.autocast)
    prepare_compiler(scale.device)
    torch.backends.cudnn.allow_tf32 = False  # float32 is the measure of the checks
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report.data["header"] = header(scale, args)
        for name, fact in report.data["header"].items():
            report.line(f"{name}: {fact}")
        for part in args.parts:
            if part == "checks":
                run_checks(report, scale)
            elif part == "plain":
                with kernels.plain():
                    run_timings(report, scale, part, how, args.networks)
            else:
                run_timings(report, scale, part, how, args.networks)
        close(report, caught)
    wrong = report.data["failed"] or not all(c["passed"] for c in report.data["checks"])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
