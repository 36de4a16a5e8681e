"""Table and figure of docs/performance.md, from the files of calculate_complexity.py --json.

    python benchmarks/performance_page.py

The files are in benchmarks/results/cpu_*.json; the page names the commands that make them.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
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
MODES = ("inference, compiled", "training, compiled", "inference, eager", "training, eager")
FAMILIES = {"d2_deit": "#0072B2", "d2_convnext": "#D55E00", "resmlp": "#009E73"}


def results() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(settings, row) of every equivariant network that was timed beside its twin."""
    for path in sorted(RESULTS.glob("cpu_*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        for row in report["results"]:
            if row["twin"] and row["ratios"].get("images_per_s"):
                details = report["settings"]["details"]
                yield report["settings"], {**row, **details[row["model"]]}


def ratios() -> dict[str, dict[str, float]]:
    """Of each network: ratios of images a second by mode, of FLOPs, of memory in training."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for settings, row in results():
        mode = "compiled" if settings["compile"] else "eager"
        own = found[row["model"]]
        own["batch"] = row["batch_size"]
        own["flops"] = 1 / row["ratios"]["gflops"]
        own.setdefault(f"inference, {mode}", row["ratios"]["images_per_s"])
        if settings["train"]:
            twin = settings["details"][row["twin"]]
            own[f"training, {mode}"] = row["ratios"]["train_images_per_s"]
            own[f"memory, {mode}"] = row["train_peak_memory_mb"] / twin["train_peak_memory_mb"]
    return found


def table() -> str:
    """All networks, a row each."""
    columns = ("flops", *MODES, "memory, compiled")
    head = ["network", "batch", "twin's FLOPs over ours", *MODES, "memory in training, compiled"]
    rows = []
    for name, own in ratios().items():
        cells = [f"{own[column]:.2f}" if column in own else "" for column in columns]
        rows.append([f"`{name}`", str(own["batch"]), *cells])
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def conditions() -> str:
    """The device and the versions."""
    settings, _ = next(results())
    return (
        f"{settings['device_name']}, {settings['dtype']}, "
        f"torch {settings['versions']['torch']}, timm {settings['versions']['timm']}"
    )


def draw() -> Figure:
    """Throughput over the twin's, beside the ratio of FLOPs that it could follow."""
    found = ratios()
    modes = [mode for mode in MODES if any(mode in own for own in found.values())]
    figure = Figure(figsize=(3.4 * len(modes), 4.2), layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), sharex=True), modes, strict=True):
        timed = {name: own for name, own in found.items() if mode in own}
        for place, (name, own) in enumerate(timed.items()):
            colour = next(c for prefix, c in FAMILIES.items() if name.startswith(prefix))
            axes.barh(place, own[mode], color=colour)
            axes.plot([own["flops"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
            axes.text(0.05, place, f"{own[mode]:.2f}", va="center", color="white", fontsize=8)
        axes.set_yticks(range(len(timed)), [re.sub("_patch16_LS", "", name) for name in timed])
        axes.tick_params(axis="y", labelsize=7)
        axes.invert_yaxis()
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set_title(mode, fontsize=9)
    figure.supxlabel("throughput over the ordinary twin's; black: the ratio of their FLOPs",
                     fontsize="small")  # fmt: skip
    figure.suptitle(conditions(), fontsize="small")
    return figure


def main() -> int:
    CommandLine(description=__doc__.splitlines()[0]).parse_args()
    page = PAGE.read_text(encoding="utf-8")
    for name, text in {"measured": table(), "conditions": conditions() + "."}.items():
        block = f"<!-- {name} -->\n\n{text}\n\n<!-- /{name} -->"
        pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
        page, count = re.subn(pattern, lambda _, block=block: block, page, flags=re.DOTALL)
        if count != 1:
            sys.exit(f"error: {PAGE} has {count} places for {name!r}, expected one")
    write_text(PAGE, page)
    with atomic_path(FIGURE) as temporary:
        draw().savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    print(f"{PAGE}\n{FIGURE}")
    return 0


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
