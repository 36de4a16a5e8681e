"""Half an hour on one GPU: is every family right there, and how fast is it beside its twin?

    python benchmarks/gpu.py --minutes 25 --output gpu      # again: goes on with what is left
    python benchmarks/gpu.py --against ../before --output gpu      # another checkout's networks too
    python benchmarks/gpu.py --report gpu                          # table and figure alone

vit         compiled ViT S, B, L, H: inference and training, batch 64, bf16, in turns with the twin
exactness   outputs and gradients in float32 and bf16 against float64 on the CPU, every family
families    the other families, as `vit`
profile     time by kernel, and the bytes that Inductor counts, of ViT-B and its twin
latency     batch 8 with CUDA graphs (reduce-overhead)
large       batch 256 with max-autotune
training    two epochs of deit/main.py with EMA and random erasing on the bundled sample

Every row goes to rows.jsonl in --output as it comes; report.md and report.png are made from it.
Each part has a share of the time and leaves what it does not need to the next ones. What fails, or
is too slow, costs its own row. `--device cpu --quick` tries it all out at tiny sizes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.gpu_jobs import PARTS, Row, networks
from benchmarks.gpu_tables import write_report
from deit.cli import CommandLine, OptionGroup, number
from deit.errors import UserError, one_line_errors

ROOT, ROWS = Path(__file__).resolve().parents[1], "rows.jsonl"
# Seconds that a job needs at least, before another of its part has run; seconds for the report.
FIRST_GUESS, CLOSING = 20.0, 10.0


class Rows:
    """The lines of a file, each on the disk before the next one is made."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / ROWS
        self.rows = read_rows(self._path) if self._path.exists() else []
        text = self._path.read_bytes() if self._path.exists() else b""
        if text and not text.endswith(b"\n"):  # of a run that was killed
            with self._path.open("ab") as file:
                file.write(b"\n")

    def add(self, row: Row) -> None:
        """Append a row, and print it in short."""
        self.rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        shown = {k: v for k, v in row.items() if not isinstance(v, dict)}
        print(
            "  ".join(f"{v:.4g}" if isinstance(v, float) else str(v)[:120] for v in shown.values()),
            flush=True,
        )

    def done(self, job: Row) -> bool:
        """Whether a job ended well before."""
        keys = ("checkout", "part", "name")
        same = [row for row in self.rows if all(row.get(key) == job[key] for key in keys)]
        return any("finished_s" in row for row in same)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file. A line that was cut short is left out.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"no results in {str(path)!r}: {error.strerror or error}") from None
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Worker:
    """A process that measures the networks of one checkout; started when it is needed."""

    def __init__(self, root: Path, log: Path) -> None:
        self.root, self._log = root, log
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, job: Row, rows: Rows, stop: float) -> str | None:
        """Do a job until `stop`, by the monotonic clock; what was wrong in words, or None."""
        if self._process is None:
            with self._log.open("ab") as log:
                script = Path(__file__).with_name("gpu_jobs.py")  # with nothing of this checkout
                command = [sys.executable, str(script), str(self.root)]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
                    start_new_session=True,
                )  # fmt: skip
        process, buffer = self._process, b""
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # if it has ended, reading will tell
            process.stdin.write(json.dumps({**job, "root": str(self.root)}).encode() + b"\n")
        while True:
            left = stop - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                self.close()
                return "given up: its part's time was over"
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                status = process.wait()
                self._process = None
                return f"its process ended with status {status}: see {self._log.name}"
            *lines, buffer = (buffer + chunk).split(b"\n")
            for row in map(json.loads, lines):
                if "done" not in row:
                    rows.add({key: job[key] for key in ("checkout", "part", "name")} | row)
                    continue
                if row.get("lost"):
                    self.close()
                return row.get("error")

    def close(self) -> None:
        """End the process, whatever it is doing, and those that it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def run(args: Namespace, started: float) -> int:
    """All parts; 1 if something failed."""
    rows = Rows(args.output)
    setting = {"device": args.device, "quick": args.quick, "compile_blocks": args.compile_blocks}
    earlier = [row for row in rows.rows if row["part"] == "run"]
    if earlier and any(earlier[0][key] != value for key, value in setting.items()):
        raise UserError(f"--output {args.output} holds results of other settings: name another one")
    command = shlex.join(["python", *sys.argv])
    rows.add({"part": "run", "time": time.strftime("%F %T"), "command": command} | setting)
    roots = {"this": ROOT} | ({"against": args.against.resolve()} if args.against else {})
    workers = {name: Worker(root, args.output / "worker.log") for name, root in roots.items()}
    end = started + 60 * args.minutes - CLOSING
    total = sum(PARTS[part][0] for part in args.parts)
    failed = spent = 0
    try:
        for name, worker in workers.items():
            job = {
                "kind": "conditions",
                "checkout": name,
                "part": "conditions",
                "name": "",
            } | setting
            if error := worker.run(job, rows, end):
                rows.add({"checkout": name, "part": "conditions", "name": "", "error": error})
                failed += 1
        begin = time.monotonic()
        for part in args.parts:
            share, kind, options, _ = PARTS[part]
            spent += share
            stop, longest = (
                begin + (end - begin) * spent / total,
                0.0 if args.quick else FIRST_GUESS,
            )
            for network in networks(part, args.quick):
                for checkout, worker in workers.items():
                    job = {"kind": kind, "checkout": checkout, "part": part, "name": network}
                    job |= options | setting | {"seconds": args.seconds}
                    job |= {"batch": 2} if args.quick else {}
                    if rows.done(job):
                        continue
                    about = {key: job[key] for key in ("checkout", "part", "name")}
                    now = time.monotonic()
                    if stop - now < longest or now >= stop:
                        rows.add(about | {"skipped": "no time was left"})
                        continue
                    error = worker.run(job, rows, stop)
                    took = time.monotonic() - now
                    longest = max(longest, took)
                    failed += error is not None
                    how = {"error": error} if error else {"finished_s": round(took, 1)}
                    rows.add(about | how)
    finally:
        for worker in workers.values():
            worker.close()
        print(*write_report(args.output, rows.rows), sep="\n")
    return 1 if failed else 0


def get_parser() -> CommandLine:
    parser = CommandLine(description=__doc__)
    group = OptionGroup(parser, "benchmark")
    group.add("--minutes", number(float, 0), 25.0, "N", "end in so many minutes")
    group.add("--output", Path, Path("gpu"), "FOLDER", "results; those that it has are kept")
    group.add(
        "--report", Path, None, "FOLDER", "make table and figure of a folder, and nothing else"
    )
    group.add("--against", Path, None, "CHECKOUT", "another checkout to measure in turns with this")
    names = tuple(PARTS)
    group.add("--parts", str, names, "PART", "in this order", nargs="+", choices=names)
    group.add("--seconds", number(float, 0), 1.0, "S", "of timing for each network")
    group.add("--device", str, "cuda", "NAME", "cuda, or cpu with --quick", choices=("cuda", "cpu"))
    group.switch("--compile-blocks", "compile block by block in the parts without CUDA graphs")
    group.switch("--quick", "tiny networks, not compiled: to try the parts out")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    started = time.monotonic()
    args = get_parser().parse_args(argv)
    if args.report is not None:
        print(*write_report(args.report, read_rows(args.report / ROWS)), sep="\n")
        return 0
    if args.device == "cpu" and not args.quick:
        raise UserError("--device cpu is for trying out: add --quick")
    if args.against and not (args.against / "calculate_complexity.py").is_file():
        raise UserError(f"--against {args.against} is no checkout of this project")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device: only --device cpu --quick runs without one")
    return run(args, started)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
