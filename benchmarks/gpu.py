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

Every job is one of the project's commands, in a process of its own. Its row goes to rows.json in
--output as it ends, and what it printed to a file beside; report.md and report.png are made from
them. Each part has a share of the time and leaves what it does not need to the next ones. What
fails, or is too slow, costs its own row. `--device cpu --quick` tries it all out at tiny sizes.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.performance_page import bars, markdown, save
from deit.cli import CommandLine, OptionGroup, number
from deit.errors import UserError, one_line_errors
from deit.saving import write_text

ROOT, ROWS = Path(__file__).resolve().parents[1], "rows.json"
# Seconds that a job needs at least, before another of its part has run; seconds for the report.
FIRST_GUESS, CLOSING = 20.0, 10.0
Row = dict[str, Any]

VIT = ("d2_deit_small_patch16_LS", "d2_deit_base_patch16_LS", "d2_deit_large_patch16_LS",
       "d2_deit_huge_patch14_LS")  # fmt: skip
OTHERS = ("d2_convnext_isotropic_base", "resmlp_equi_d2_B_24", "d2_convnext_base",
          "d2_convnext_isotropic_small", "resmlp_equi_d2_12", "hybrid_deit_base_patch16_LS",
          "d2_convnext_isotropic_large", "resmlp_equi_d2_L_24")  # fmt: skip
TIMED = ("calculate_complexity.py --device {device} --models {name} --json {stem}.json "
         "--min-time {seconds} --amp")  # fmt: skip
COMPILED = TIMED + " {compile} --train --batch-size 64"
CHECKED = "benchmarks/exactness.py --device {device} --json {stem}.json"
TRAINED = ("deit/main.py --device {device} --model {name} --output-dir {stem} {compile} --epochs 2 "
           "--warmup-epochs 0 --model-ema --reprob 0.25 --batch-size 128")  # fmt: skip
# part: share of the time, command, networks; of exactness all families are one job
PARTS: dict[str, tuple[float, str, Sequence[str]]] = {
    "vit": (8, COMPILED, VIT),
    "exactness": (2, CHECKED, ("all families",)),
    "families": (5, COMPILED, OTHERS),
    "profile": (2, f"{COMPILED} --profile", VIT[1:2]),
    "latency": (2.5, f"{TIMED} --compile-mode reduce-overhead --batch-size 8",
                [*VIT[:2], *OTHERS[:2]]),
    "large": (3, f"{TIMED} --compile-mode max-autotune --batch-size 256", [VIT[1], *OTHERS[:2]]),
    "training": (2.5, TRAINED, [VIT[0], VIT[0].removeprefix("d2_")]),
}  # fmt: skip
# What a quick run has beside, or in place of what it is given twice.
QUICK = {
    "calculate_complexity.py": "--no-compile --img-size 32 --model-kwargs depth=1 "
    "depths=(1,1,1,1) --batch-size 2",
    "benchmarks/exactness.py": "--img-size 32 --model-kwargs depth=1 depths=(1,1,1,1) "
    "--batch-size 2",
    "deit/main.py": "--no-compile --input-size 32 --model-kwargs depth=1 embed_dim=24 "
    "--batch-size 250 --num-workers 0 --aa none",
}


def command(job: Row, args: Namespace, stem: Path) -> list[str]:
    """What a job runs; its results get names that begin with `stem`."""
    words = shlex.split(PARTS[job["part"]][1].format(
        name=job["name"], stem=shlex.quote(str(stem)), device=args.device, seconds=args.seconds,
        compile="--compile-blocks" if args.compile_blocks else "--compile",
    ))  # fmt: skip
    return words + (QUICK[words[0]].split() if args.quick else [])


def results(job: Row, stem: Path) -> Row:
    """Lines for the tables, from what a job has written, and speeds over the twin's.

    Training leaves the log of its run, the others JSON.
    """
    name, log, report = f"`{job['name']}`", stem / "log.txt", Path(f"{stem}.json")
    if log.exists():
        epochs = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        numbers = [", ".join(f"{e[key]:.3f}" for e in epochs) for key in ("time", "train_loss")]
        return {"lines": [[name, *numbers]]}
    if not report.exists():
        return {}
    found = json.loads(report.read_text(encoding="utf-8"))
    if job["part"] == "exactness":
        return {"lines": [
            [f"`{of}`", precision, *(f"{error:.1e}" for error in both.values())]
            for of, errors in found.items() for precision, both in errors.items()
        ]}  # fmt: skip
    settings, lines, speeds = found["settings"], [], {}
    twin, ours = (row | settings["details"][row["model"]] for row in found["results"])
    for what, prefix in (("inference", ""), ("training", "train_")):
        rates, memory = f"{prefix}images_per_s", f"{prefix}peak_memory_mb"
        if not ours[rates]:
            continue
        speeds[what] = ours["ratios"][rates]
        lines.append([
            name, job["part"], what, str(ours["batch_size"]), str(settings["compile_mode"]),
            f"{twin[rates]:.1f}", f"{ours[rates]:.1f}", f"{speeds[what]:.2f}",
            f"{ours[memory] / twin[memory]:.2f}" if twin[memory] else "",
        ])  # fmt: skip
    device = [settings["device_name"], settings["versions"]]
    return {"lines": lines, "speeds": speeds, "device": device}


def execute(words: Sequence[str], root: Path, log: Path, seconds: float) -> str | None:
    """Run a script of the checkout at `root`; what was wrong in words, or None."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
            stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return "given up: its part's time was over"
    finally:
        if process.poll() is None:  # with the processes that it started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    return f"ended with status {status}: {last[:300]}" if status else None


def read_rows(folder: Path) -> list[Row]:
    """The rows of earlier runs.

    Raises:
        UserError: there are none.
    """
    try:
        return json.loads((folder / ROWS).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no results in {str(folder)!r}: {error.strerror or error}") from None


def run(args: Namespace, started: float) -> int:
    """All parts; 1 if something failed."""
    args.output.mkdir(parents=True, exist_ok=True)
    rows = read_rows(args.output) if (args.output / ROWS).exists() else []
    setting = {"device": args.device, "quick": args.quick, "compile_blocks": args.compile_blocks}
    if not all(setting.items() <= row.items() for row in rows if row["part"] == "run"):
        raise UserError(f"--output {args.output} holds results of other settings: name another one")
    roots = {"this": ROOT} | ({"against": args.against.resolve()} if args.against else {})

    def add(row: Row) -> None:
        rows.append(row)
        write_text(args.output / ROWS, json.dumps(rows, indent=1) + "\n")
        print(*(v for key, v in row.items() if key not in ("lines", "device")), flush=True)

    add({"part": "run", "time": time.strftime("%F %T")} | setting | conditions(roots))
    begin, end = time.monotonic(), started + 60 * args.minutes - CLOSING
    stops = dict(zip(args.parts, accumulate(PARTS[part][0] for part in args.parts), strict=True))
    scale = (end - begin) / max(stops.values())
    longest: dict[str, float] = defaultdict(lambda: 0.0 if args.quick else FIRST_GUESS)
    jobs = [
        {"checkout": checkout, "part": part, "name": name}
        for part in args.parts
        for name in PARTS[part][2][: 1 if args.quick else None]
        for checkout in roots
    ]
    failed = False
    try:
        for job in jobs:
            if any("finished_s" in row and job.items() <= row.items() for row in rows):
                continue
            now, part = time.monotonic(), job["part"]
            left = begin + scale * stops[part] - now
            if left < longest[part] or left <= 0:
                add(job | {"skipped": "no time was left"})
                continue
            stem = args.output.resolve() / "-".join(job.values()).replace(" ", "_")
            words = command(job, args, stem)
            error = execute(words, roots[job["checkout"]], Path(f"{stem}.txt"), left)
            took = time.monotonic() - now
            longest[part] = max(longest[part], took)
            failed |= error is not None
            how = {"error": error} if error else {"finished_s": round(took, 1)}
            add(job | how | results(job, stem))
    finally:
        write_report(args.output, rows)
    return int(failed)


def conditions(roots: dict[str, Path]) -> Row:
    """What the numbers depend on beside what each job's own results say."""
    query = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,power.draw"
    commands = {query: f"nvidia-smi --query-gpu={query} --format=csv,noheader"}
    commands |= {
        name: f"git -C {shlex.quote(str(root))} describe --always --dirty"
        for name, root in roots.items()
    }
    found = {name: subprocess.getoutput(f"{words} 2>/dev/null") for name, words in commands.items()}
    return {"command": shlex.join(["python", *sys.argv])} | found


TABLES = (  # title, parts, heads of the columns behind the network
    ("Rates and peak memory", PARTS.keys() - {"exactness", "training"},
     ["part", "", "batch", "compile mode", "twin, images/s", "ours, images/s",
      "speed over twin's", "memory over twin's"]),
    ("Relative errors against float64", {"exactness"}, ["in", "logits", "gradients"]),
    ("Two epochs of deit/main.py", {"training"}, ["seconds", "loss"]),
)  # fmt: skip


def write_report(folder: Path, rows: Sequence[Row]) -> None:
    """Write report.md and report.png: the tables, what they depend on, and what is missing."""
    texts = ["# Networks beside their ordinary twins"]
    texts += ["\n".join(f"- {k}: {v}" for k, v in r.items()) for r in rows if r["part"] == "run"]
    used = {json.dumps(row["device"]) for row in rows if "device" in row and row["part"] != "run"}
    texts += [f"- device: {device}" for device in sorted(used)]
    for title, parts, head in TABLES:
        lines = [
            [*line, row["checkout"]]
            for row in rows if row["part"] in parts for line in row.get("lines", ())
        ]  # fmt: skip
        if lines:
            texts.append(f"## {title}\n\n{markdown(['network', *head, 'checkout'], lines)}")
    for path in sorted(folder.glob("*-profile-*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        texts.append(f"## Profile: {path.stem}\n\n```\n{text}\n```")
    last = {(r.get("checkout"), r["part"], r.get("name")): r for r in rows}
    missing = [
        f"- {', '.join(map(str, key))}: {row.get('error') or 'skipped, ' + row['skipped']}"
        for key, row in last.items() if "error" in row or "skipped" in row
    ]  # fmt: skip
    texts += ["## Missing\n\n" + "\n".join(missing)] if missing else []
    write_text(folder / "report.md", "\n\n".join(texts) + "\n")
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        for what, speed in row.get("speeds", {}).items():
            name = row["name"] + " (against)" * (row["checkout"] == "against")
            found[name][f"{row['part']}, {what}"] = speed
    panels = list(dict.fromkeys(panel for own in found.values() for panel in own))
    save(bars(found, panels, "Networks beside their ordinary twins"), folder / "report.png")
    print(folder / "report.md", folder / "report.png", sep="\n")


# fmt: off
def get_parser() -> CommandLine:
    parser = CommandLine(description=__doc__)
    group = OptionGroup(parser, "benchmark")
    group.add("--minutes", number(float, 0), 25.0, "N", "end in so many minutes")
    group.add("--output", Path, Path("gpu"), "FOLDER", "results; those that it has are kept")
    group.add("--report", Path, None, "FOLDER",
              "make table and figure of a folder, and nothing else")
    group.add("--against", Path, None, "CHECKOUT", "another checkout to measure in turns with this")
    group.add("--parts", str, tuple(PARTS), "PART", "in this order", nargs="+",
              choices=tuple(PARTS))
    group.add("--seconds", number(float, 0), 1.0, "S", "of timing for each network")
    group.add("--device", str, "cuda", "NAME", "cuda, or cpu with --quick", choices=("cuda", "cpu"))
    group.switch("--compile-blocks", "compile block by block in the parts without CUDA graphs")
    group.switch("--quick", "tiny networks, not compiled: to try the parts out")
    return parser
# fmt: on


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    started = time.monotonic()
    args = get_parser().parse_args(argv)
    if args.report is not None:
        write_report(args.report, read_rows(args.report))
        return 0
    if args.device == "cpu" and not args.quick:
        raise UserError("--device cpu is for trying out: add --quick")
    if args.against and not (args.against / "calculate_complexity.py").is_file():
        raise UserError(f"--against {args.against} is no checkout of this project")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device: only --device cpu --quick runs without one")
    return run(args, started)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
