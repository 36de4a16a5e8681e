"""Tables and figure of docs/performance.md, from the result files in benchmarks/results.

    python benchmarks/performance_page.py

The files are those of `calculate_complexity.py --json` and `benchmarks/cpu_report.py --json`; the
page names the commands.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from matplotlib.figure import Figure

from deit.cli import CommandLine
from deit.errors import one_line_errors
from deit.saving import atomic_path, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
FIGURE = ROOT / "assets" / "throughput.png"
# families: a pattern of names, and the colour of their lines
FAMILIES = {"ViT": ("d2_deit", "#0072B2"), "ConvNeXt-iso": ("d2_convnext", "#D55E00"),
            "ResMLP": ("resmlp_equi", "#009E73")}  # fmt: skip
WIDTHS = {"small": 384, "12": 384, "24": 384, "base": 768, "B": 768, "large": 1024, "L": 1280}


def load(pattern: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(settings, result) of every equivariant network in the files that match."""
    for path in sorted(RESULTS.glob(pattern)):
        report = json.loads(path.read_text(encoding="utf-8"))
        for row in report["results"]:
            if row["twin"] and row["ratios"].get("images_per_s"):
                settings = report["settings"]
                twin = settings["details"][row["twin"]]
                yield settings, {**row, **settings["details"][row["model"]], "twin_details": twin}


def width(name: str) -> int:
    """Number of channels, from a network's name."""
    size = re.search(r"_(small|base|large|B|L|12|24)(_|$)", name)
    return WIDTHS[size[1]]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def inference_table() -> str:
    """Ratios of all networks, eager and compiled, and of training."""
    rows: dict[str, dict[str, Any]] = {}
    for settings, row in load("cpu_*.json"):
        mode = "compiled" if settings["compile"] else "eager"
        found = rows.setdefault(row["model"], {"batch": row["batch_size"]})
        found[mode] = row["ratios"]["images_per_s"]
        found["flops"] = row["ratios"]["gflops"]
        if settings["train"]:
            found["training"] = row["ratios"]["train_images_per_s"]
            found["memory"] = (
                row["train_peak_memory_mb"] / (row["twin_details"]["train_peak_memory_mb"])
            )
    head = ["network", "batch", "twin's FLOPs over ours", "eager", "compiled",
            "training step, eager", "its peak memory"]  # fmt: skip
    columns = ("eager", "compiled", "training", "memory")
    return markdown(
        head,
        [
            [f"`{name}`", str(found["batch"]), number(1 / found["flops"])]
            + [number(found.get(column)) for column in columns]
            for name, found in rows.items()
        ],
    )


def variants_table() -> str:
    """Where the gain comes from."""
    rows = []
    for path in sorted(RESULTS.glob("variants_*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        mode = "compiled" if report["compile"] else "eager"
        for name, seconds in report["seconds"].items():
            ours, twin = seconds["ours"], seconds["twin"]
            ratios = (twin / ours, seconds["twin, oneDNN"] / ours, twin / seconds["ours, plain"])
            rows.append([f"`{name}`", mode, *map(number, ratios)])
    head = ["network", "", "ours over twin", "ours over twin with oneDNN", "plain over twin"]
    return markdown(head, rows)


def draw() -> Figure:
    """How the ratio grows with width, resolution and batch."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    by_width, by_size, by_batch = figure.subplots(1, 3, sharey=True)
    for family, (prefix, colour) in FAMILIES.items():
        for compiled, style, face in ((False, "-", colour), (True, "--", "white")):
            points = {
                width(row["model"]): row["ratios"]["images_per_s"]
                for settings, row in load("cpu_*.json")
                if row["model"].startswith(prefix) and settings["compile"] is compiled
                and not row["model"].endswith("d2_24")  # as wide as the one of depth 12
            }  # fmt: skip
            label = f"{family}, {'compiled' if compiled else 'eager'}"
            by_width.plot(
                *_line(points), style, marker="o", markerfacecolor=face, color=colour, label=label
            )
        sizes = {
            settings["img_size"]: row["ratios"]["images_per_s"]
            for settings, row in load("size_*.json")
            if row["model"].startswith(prefix)
        }
        batches = {
            row["batch_size"]: row["ratios"]["images_per_s"]
            for pattern in ("batch_*.json", "cpu_eager_small.json")
            for _, row in load(pattern)
            if row["model"].startswith(prefix)
        }
        by_size.plot(*_line(sizes), marker="o", color=colour, label=family)
        by_batch.plot(*_line(batches), marker="o", color=colour, label=family)
    by_width.set(
        xlabel="channels (batch 8; from 1024 channels 4)",
        ylabel="throughput over the ordinary twin's",
        ylim=(0, None),
    )
    by_width.legend(fontsize="x-small", loc="lower right", handlelength=4, framealpha=1)
    by_size.set(xlabel="image size (base networks, eager, batch 4)")
    by_batch.set(xlabel="batch size (small networks, eager)", xscale="log")
    for axes in (by_size, by_batch):
        values = sorted({int(x) for line in axes.lines for x in line.get_xdata()})
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
    for axes in (by_width, by_size, by_batch):
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
    figure.suptitle(_conditions(), fontsize="small")
    return figure


def _line(points: dict[int, float]) -> tuple[list[int], list[float]]:
    return sorted(points), [points[x] for x in sorted(points)]


def _conditions() -> str:
    settings = next(settings for settings, _ in load("cpu_*.json"))
    return (
        f"{settings['device_name']}, {settings['dtype']}, "
        f"torch {settings['versions']['torch']}, timm {settings['versions']['timm']}"
    )


def main() -> None:
    CommandLine(description=__doc__.splitlines()[0]).parse_args()
    page = PAGE.read_text(encoding="utf-8")
    tables = {"inference": inference_table(), "variants": variants_table(),
              "conditions": _conditions() + "."}  # fmt: skip
    for name, table in tables.items():
        block = f"<!-- {name} -->\n\n{table}\n\n<!-- /{name} -->"
        pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
        page, count = re.subn(pattern, lambda _, block=block: block, page, flags=re.DOTALL)
        if count != 1:
            sys.exit(f"error: {PAGE} has {count} places for the table {name!r}, expected one")
    write_text(PAGE, page)
    with atomic_path(FIGURE) as temporary:
        draw().savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    print(f"{PAGE}\n{FIGURE}")


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
