"""Everything about equivariant networks on a GPU, in one run: is it right, and is it fast?

    python benchmarks/gpu_report.py --output report      # within --minutes, 8.5 by default
    python benchmarks/gpu_report.py --rehearse           # the same at tiny sizes, on a CPU

checks      fused operations against float64, networks with fused paths against plain formulas
kernels     fused operations beside what the twin does instead: rates of all implementations
inference   bfloat16, compiled, batch 64: ours beside the ordinary twin, also as CUDA graphs
training    forward, backward and fused AdamW with bfloat16 autocast, batch 64; peak memory
large       inference with batch 256
plain       inference of batch 64 without fused paths
profile     time by kernel of a network of each family and of its twin, training and inference

Twins are timed in turns; a ratio is the median over pairs of neighbouring samples, above one where
ours is faster. With `--compile blocks`, which takes seconds for a network where `whole` takes a
minute, every block is compiled by itself (once for all blocks), for both twins alike. What there is
no time for is skipped and named, and what still runs at the end of the time is given up. A failure
costs its own line; if it leaves the device unusable, another process does the rest. The tables are
repeated at the end; report.json and report.log in --output have everything.
"""

# ruff: noqa: E402 - the clock is read before the imports, which take a part of the time

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

STARTED = time.monotonic()  # imports take a part of the time

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.gpu_checks import CASES, DTYPES, check_network, check_operation
from benchmarks.gpu_kernels import compete, contests
from benchmarks.gpu_timing import HEADING, Network, Options, Row, Scale, measure, profile
from deit import kernels
from deit.cli import CommandLine, OptionGroup, number
from deit.complexity.hardware import describe, measure_ceilings, synchronize, versions
from deit.complexity.subject import prepare_compiler, release
from deit.errors import UserError, one_line, one_line_errors
from deit.kernels import backends, tuning

# The parts, and how they share the time. What one leaves is for those after it.
PARTS = {
    "checks": 3.0,
    "kernels": 0.7,
    "inference": 3.5,
    "training": 2.5,
    "large": 0.8,
    "plain": 0.4,
    "profile": 0.8,
}
COMPILE = ("blocks", "whole", "none")
# Seconds that a job needs at least, before any of its kind has run.
FIRST_GUESS = 10.0


TRIAL = "compiler trial"
# Seconds after the end at which what still runs is given up.
GRACE = 10.0
# Exit status after that.
GAVE_UP = 3
# Warnings that say that a fused path is not what runs.
TELLING = ("runs without its implementation", "calls the fused operations through Python")


class DeviceLost(Exception):
    """After an error such as an illegal address, no work on the device succeeds any more."""


class Report:
    """Prints lines as they come and keeps everything in a folder, if there is one."""

    def __init__(
        self,
        folder: Path | None,
        minutes: float,
        parts: Sequence[str],
        device: torch.device | None = None,
        done: Sequence[str] = (),
        started: float | None = None,
    ) -> None:
        self._folder, self._device = folder, device
        self._start = time.monotonic() if started is None else started
        self._end, total = {}, sum(PARTS[part] for part in parts)
        for i, part in enumerate(parts):
            share = sum(PARTS[other] for other in parts[: i + 1]) / total
            self._end[part] = self._start + 60 * minutes * share
        self.stop = self._start + 60 * minutes
        self._lines: list[str] = []
        self._longest: dict[str, float] = {}
        self._closing = threading.Lock()
        self.doing = "the beginning"
        self.done = list(done)
        self.data: dict[str, Any] = {
            key: {} if key == "header" else []
            for key in ("header", "checks", "kernels", "rows", "profiles", "failed", "skipped")
        }
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def line(self, text: str) -> None:
        print(text, flush=True)
        self._lines.append(text)

    def fact(self, name: str, value: object) -> None:
        self.data["header"][name] = value
        self.line(f"{name}: {value}")

    def fail(self, text: str) -> None:
        self.data["failed"].append(text)
        self.line(text)

    def save(self) -> None:
        self.data["seconds"] = round(time.monotonic() - self._start, 1)
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
        """Do `work` if its part has time for the longest of its kind so far; report a failure.

        Raises:
            DeviceLost: if nothing else can be done on the device in this process.
        """
        began, self.doing = time.monotonic(), f"{kind} {name}"
        if self.doing in self.done:
            return
        if self._end.get(part, self.stop) - began < self._longest.get(kind, FIRST_GUESS):
            self.data["skipped"].append(self.doing)
            return
        self.done.append(self.doing)
        lost = False
        try:
            work()
        except Exception as error:  # the rest of the report is worth having
            reason = f"{type(error).__name__}: {one_line(error)[:300]}"
            self.fail(f"FAIL {self.doing}: {reason}")
            lost = is_lost(self._device)
        seconds = time.monotonic() - began
        self._longest[kind] = max(self._longest.get(kind, 0.0), seconds)
        self.save()
        if lost:
            raise DeviceLost(self.doing)

    def give_up_in_time(self, close: Callable[[], None]) -> threading.Timer:
        """End the process at the end of the time, whatever it is doing, after `close`."""

        def give_up() -> None:
            if self._closing.acquire(blocking=False):
                try:
                    self.fail(f"FAIL {self.doing}: given up at the end of the time")
                    close()
                finally:
                    os._exit(GAVE_UP)

        timer = threading.Timer(max(0.0, self.stop + GRACE - time.monotonic()), give_up)
        timer.daemon = True
        timer.start()
        return timer

    def close_once(self, close: Callable[[], None]) -> None:
        """`close`, unless the time is over and another thread is at it, which ends the process."""
        self._closing.acquire()
        close()


def is_lost(device: torch.device | None) -> bool:
    """Whether an error has left the device unusable for this process."""
    if device is None or device.type != "cuda":
        return False
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        return not isinstance(error, torch.OutOfMemoryError)
    return False


def header(report: Report, scale: Scale, args: Any) -> None:
    """What the numbers depend on."""
    report.fact("command", shlex.join([Path(sys.executable).name, *sys.argv]))
    report.fact("revision", _output("git", "describe", "--always", "--dirty"))
    report.fact("device", describe(scale.device))
    query = "--query-gpu=driver_version,clocks.sm,power.limit"
    report.fact("driver, clock, power", _output("nvidia-smi", query, "--format=csv,noheader"))
    report.fact("versions", versions())
    report.fact("machine", f"{platform.platform()}, {os.cpu_count()} processors")
    report.fact(
        "settings",
        f"compile {args.compile} by {scale.backend}, batches {scale.batch} and "
        f"{scale.large_batch}, at least {args.seconds:g} s each, kernels {kernels.get_mode()}, "
        f"inference {'under autocast' if args.autocast else 'with bfloat16 weights'}",
    )
    if scale.device.type == "cuda":
        ceilings = measure_ceilings(scale.device, torch.bfloat16)
        report.fact("bf16 matrix product", f"{ceilings.flops_per_s / 1e12:.0f} TFLOP/s")
        report.fact("copy", f"{ceilings.bytes_per_s / 1e12:.2f} TB/s, read and written")


def try_compiler(report: Report, scale: Scale) -> None:
    """Whether compiled code will launch kernels by itself, and how long it took to see."""
    began = time.monotonic()
    prepare_compiler(scale.device)
    seconds = time.monotonic() - began
    trusted = scale.device.type in {device.type for device in backends.trusted}
    report.fact("kernels launched by compiled code", f"{trusted}, tried in {seconds:.1f} s")
    synchronize(scale.device)  # raises if the trial has lost the device


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
        if not row.right:
            report.fail(f"FAIL {part} {network.name}: compiled logits are wrong")

    for network in scale.networks:
        if any(fnmatchcase(network.name, pattern) for pattern in patterns):
            report.attempt(part, part, network.name, lambda network=network: add(network))


def run_kernels(report: Report, scale: Scale) -> None:
    """The operations by themselves."""

    def add(build: Callable[[], Any]) -> None:
        for duel in compete(build(), scale.device):
            report.data["kernels"].append(asdict(duel))
            report.line(str(duel))

    for name, build in contests(scale.device, scale.batch, scale.device.type == "cpu"):
        report.attempt("kernels", "kernels", name, lambda build=build: add(build))
        release(scale.device)


def run_profiles(report: Report, scale: Scale, options: Options, patterns: Sequence[str]) -> None:
    """Of the first network of each family."""

    def add(network: Network, training: bool) -> None:
        for found in profile(network, scale, options, training):
            found.kernels = dict(list(found.kernels.items())[:40])
            report.data["profiles"].append(asdict(found))
            report.line(str(found))

    for network in scale.networks[:3]:
        if any(fnmatchcase(network.name, pattern) for pattern in patterns):
            for training in (True, False):
                name = f"{network.name} {'training' if training else 'inference'}"
                work = lambda network=network, training=training: add(network, training)  # noqa: E731
                report.attempt("profile", "profile", name, work)


def run_part(report: Report, scale: Scale, part: str, how: Options, args: Any) -> None:
    """One of `PARTS`."""
    if part == "checks":
        run_checks(report, scale)
    elif part == "kernels":
        run_kernels(report, scale)
    elif part == "profile":
        run_profiles(report, scale, how, args.networks)
    elif part == "plain":
        with kernels.plain():
            run_timings(report, scale, part, how, args.networks)
    else:
        run_timings(report, scale, part, how, args.networks)


def run_rest(report: Report, parts: Sequence[str], lost: str, output: Path | None) -> None:
    """Do the `parts` that are left in another process, which has a device that works."""
    done = [name for name in report.done if name == lost or name != TRIAL]
    minutes = (report.stop - time.monotonic()) / 60
    command = [sys.executable, *sys.argv, "--parts", *parts, "--minutes", f"{minutes:.2f}"]
    command += ["--done", *done] + (["--output", str(output / "rest")] if output else [])
    if minutes > 0.5:
        print(f"\nafter {lost} the device is lost; another process does the rest", flush=True)
        subprocess.run(command, timeout=60 * minutes + 2 * GRACE, check=False)


def close(report: Report, caught: list[warnings.WarningMessage]) -> None:
    """What was chosen, then everything that a reader must see."""
    decisions = [d for d in tuning.report() if d.dtype != torch.float64]  # that is the reference
    report.data["decisions"] = [
        {**d._asdict(), "dtype": str(d.dtype), "key": repr(d.key)} for d in decisions
    ]
    texts = Counter(" ".join(str(w.message).split())[:300] for w in list(caught))
    report.data["warnings"] = dict(texts.most_common(50))
    report.data["dropped"] = sorted(t for t in texts if any(words in t for words in TELLING))
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
    options.add("--done", str, (), "NAME", "leave these out", nargs="*")
    options.switch("--rehearse", "tiny sizes on the CPU, to see that everything runs")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        raise UserError("there is no CUDA device: only --rehearse runs without one")

    scale = Scale.rehearsal() if args.rehearse else Scale(torch.device("cuda"))
    output = args.output or (Path(out) if out else None)
    report = Report(output, args.minutes, args.parts, scale.device, args.done, STARTED)
    how = Options(args.compile, args.seconds, args.autocast)
    torch.backends.cudnn.allow_tf32 = False  # float32 is the measure of the checks
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        timer = report.give_up_in_time(lambda: close(report, caught))
        left, lost = list(args.parts), None
        try:
            report.attempt("", "header", "facts", lambda: header(report, scale, args))
            report.attempt("", *TRIAL.split(), lambda: try_compiler(report, scale))
            while left:
                run_part(report, scale, left[0], how, args)
                left.pop(0)
        except DeviceLost as error:
            lost = str(error)
        report.close_once(lambda: close(report, caught))
        timer.cancel()
    if lost is not None:
        run_rest(report, left, lost, output)
    wrong = report.data["failed"] or not all(c["passed"] for c in report.data["checks"])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
