"""Tables and figures of docs/performance.md and the README, from the files in benchmarks/results.

    python benchmarks/performance_page.py

cpu_*.json are files of calculate_complexity.py --json, deploy.json is of benchmarks/deploy.py. The
page names the commands that make them.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from matplotlib.figure import Figure

from deit.cli import CommandLine
from deit.errors import UserError, one_line_errors
from deit.saving import atomic_path, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
MODES = ("inference, compiled", "training, compiled", "inference, eager", "training, eager")
RUNTIMES = {"onnx": "ONNX Runtime", "eager": "PyTorch, eager", "compiled": "PyTorch, compiled"}
# that are timed in every runtime, in this order
MODELS = (
    "d2_deit_small_patch16_LS",
    "d2_deit_base_patch16_LS",
    "d2_convnext_isotropic_small",
    "d2_convnext_isotropic_base",
    "resmlp_equi_d2_12",
)
FAMILIES = {"d2_deit": "#0072B2", "hybrid": "#56B4E9", "d2_convnext": "#D55E00",
            "resmlp": "#009E73"}  # fmt: skip
Ratios = Mapping[str, Mapping[str, float]]  # network to column to number


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def cells(found: Ratios, columns: Sequence[str]) -> list[list[str]]:
    """The rows of a table: the network, and its numbers where there are any."""
    return [
        [f"`{name}`", *(f"{own[column]:.2f}" if column in own else "" for column in columns)]
        for name, own in found.items()
    ]


def bars(found: Ratios, panels: Sequence[str], title: str, flops: bool = False) -> Figure:
    """A panel for each of `panels`, a bar for each network; `flops` marks its column "flops"."""
    panels = [panel for panel in panels if any(panel in own for own in found.values())]
    count = max(len(panels), 1)
    figure = Figure(figsize=(3.4 * count, 1.6 + 0.37 * len(found)), layout="constrained")
    grid = figure.subplots(1, count, sharex=True, squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=False):
        timed = {name: own for name, own in found.items() if panel in own}
        for place, (name, own) in enumerate(timed.items()):
            colour = next((c for prefix, c in FAMILIES.items() if name.startswith(prefix)), "grey")
            axes.barh(place, own[panel], color=colour)
            axes.text(0.05, place, f"{own[panel]:.2f}", va="center", color="white", fontsize=8)
            if flops:
                ends = [place - 0.4, place + 0.4]
                axes.plot([own["flops"]] * 2, ends, color="black", linewidth=1.5)
        axes.set_yticks(range(len(timed)), [re.sub("_patch1[46]_LS", "", name) for name in timed])
        axes.tick_params(axis="y", labelsize=7)
        axes.invert_yaxis()
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set_title(panel, fontsize=9)
    note = "; black: the ratio of their FLOPs" if flops else ""
    figure.supxlabel(f"throughput over the ordinary twin's{note}", fontsize="small")
    figure.suptitle(title, fontsize="small")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG that is the same for the same figure."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


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
    head = ["network", "batch", "twin's FLOPs over ours", *MODES, "memory in training, compiled"]
    found = ratios()
    rows = cells(found, ("batch", "flops", *MODES, "memory, compiled"))
    for row in rows:
        row[1] = row[1].removesuffix(".00")
    return markdown(head, rows)


def conditions() -> str:
    """The device and the versions."""
    settings, _ = next(results())
    return (
        f"{settings['device_name']}, {settings['dtype']}, "
        f"torch {settings['versions']['torch']}, timm {settings['versions']['timm']}"
    )


def deploy_ratios(known: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each network: the twin's seconds over ours by runtime; our file's size over the twin's."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    places = {name: place for place, name in enumerate(MODELS)}
    for name in sorted(known, key=lambda name: places.get(name, len(places))):
        for runtime, run in known[name].items():
            seconds = run["seconds"]
            found[name][RUNTIMES[runtime]] = seconds["twin"] / seconds["folded"]
            if "unfolded" in seconds:
                found[name][f"{runtime}, unfolded"] = seconds["twin"] / seconds["unfolded"]
            if run["bytes"]:
                found[name]["size of the file"] = run["bytes"]["folded"] / run["bytes"]["twin"]
    return found


def deploy_table(known: Mapping[str, Any]) -> str:
    """All ratios of times and of file sizes."""
    columns = [*RUNTIMES.values(), "eager, unfolded", "compiled, unfolded", "size of the file"]
    return markdown(["network", *columns], cells(deploy_ratios(known), columns))


def deploy_conditions(known: Mapping[str, Any]) -> str:
    """Machine, versions, batch and load."""
    rows = [run for runs in known.values() for run in runs.values()]
    used = rows[0]["versions"]
    packages = ", ".join(f"{n} {used[n]}" for n in ("torch", "timm", "onnxruntime") if used.get(n))
    batches = ", ".join(map(str, sorted({row["batch_size"] for row in rows})))
    loads = [row["load"] for row in rows]
    return (
        f"{rows[0]['device']}, float32, batch {batches}, {packages}; "
        f"load average {min(loads):.1f} to {max(loads):.1f}"
    )


def short_table(known: Mapping[str, Any]) -> str:
    """The README's: fewer columns, and that of ONNX Runtime."""
    found, deployed = ratios(), deploy_ratios(known)
    order = [*MODELS, *sorted(set(found) - set(MODELS))]
    columns = ("flops", *MODES[:3], RUNTIMES["onnx"])
    rows = cells({name: {**deployed.get(name, {}), **found[name]} for name in order}, columns)
    return markdown(["network", "FLOPs", *MODES[:3], "ONNX Runtime, folded"], rows)


def put(path: Path, name: str, text: str) -> None:
    """Write `text` between the marks of that name in a page."""
    block = f"<!-- {name} -->\n\n{text}\n\n<!-- /{name} -->"
    page = path.read_text(encoding="utf-8")
    pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
    page, count = re.subn(pattern, lambda _: block, page, flags=re.DOTALL)
    if count != 1:
        raise UserError(f"{path} has {count} places for {name!r}, expected one")
    write_text(path, page)


def write_page() -> None:
    """The tables between their marks in docs/performance.md and in the README, and the figures."""
    known = json.loads((RESULTS / "deploy.json").read_text(encoding="utf-8"))
    put(PAGE, "measured", table())
    put(PAGE, "conditions", conditions() + ".")
    put(PAGE, "deploy", f"{deploy_conditions(known)}.\n\n{deploy_table(known)}")
    put(README, "times", short_table(known))
    save(bars(ratios(), MODES, conditions(), flops=True), ROOT / "assets" / "throughput.png")
    figure = bars(deploy_ratios(known), list(RUNTIMES.values()), deploy_conditions(known))
    save(figure, ROOT / "assets" / "deploy.png")


def main() -> int:
    CommandLine(description=__doc__.splitlines()[0]).parse_args()
    write_page()
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
