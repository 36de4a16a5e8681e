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
from collections.abc import Mapping, Sequence
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
README, ASSETS = ROOT / "README.md", ROOT / "assets"
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
# Columns of the tables that are called otherwise than their numbers.
FLOPS, MEMORY, SIZE = "twin's FLOPs over ours", "memory in training, compiled", "size of the file"
DEPLOY = (*RUNTIMES.values(), "eager, unfolded", "compiled, unfolded", SIZE)
Ratios = Mapping[str, Mapping[str, float]]  # network to column to number


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(found: Ratios, columns: Sequence[str], titles: Sequence[str] = ()) -> str:
    """A row for each network, with its numbers where there are any."""
    rows = []
    for name, own in found.items():
        numbers = (f"{own[c]:.{0 if c == 'batch' else 2}f}" if c in own else "" for c in columns)
        rows.append([f"`{name}`", *numbers])
    return markdown(["network", *(titles or columns)], rows)


def bars(found: Ratios, panels: Sequence[str], title: str, flops: bool = False) -> Figure:
    """A panel for each of `panels`, a bar for each network; `flops` marks that ratio."""
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
                axes.plot([own[FLOPS]] * 2, ends, color="black", linewidth=1.5)
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


def ratios() -> tuple[str, dict[str, dict[str, float]]]:
    """Of each network: batch, ratios of images a second by mode, of FLOPs, of memory in training.

    Before it the device and the versions.
    """
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for path in sorted(RESULTS.glob("cpu_*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        settings = report["settings"]
        mode, details = "compiled" if settings["compile"] else "eager", settings["details"]
        for row in report["results"]:
            if not (row["twin"] and row["ratios"].get("images_per_s")):
                continue
            own, more = found[row["model"]], details[row["model"]]
            own |= {"batch": more["batch_size"], FLOPS: 1 / row["ratios"]["gflops"]}
            own.setdefault(f"inference, {mode}", row["ratios"]["images_per_s"])
            if settings["train"]:
                twins = details[row["twin"]]["train_peak_memory_mb"]
                own[f"training, {mode}"] = row["ratios"]["train_images_per_s"]
                own[f"memory in training, {mode}"] = more["train_peak_memory_mb"] / twins
    used = settings["versions"]
    return (f"{settings['device_name']}, {settings['dtype']}, torch {used['torch']}, "
            f"timm {used['timm']}"), found  # fmt: skip


def deploy_ratios(known: Mapping[str, Any]) -> tuple[str, dict[str, dict[str, float]]]:
    """Of each network: the twin's seconds over ours by runtime; our file's size over the twin's.

    Before it the machine, the versions, the batch and the load.
    """
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name in sorted(known, key=lambda name: [*MODELS, name].index(name)):
        for runtime, run in known[name].items():
            seconds = run["seconds"]
            found[name][RUNTIMES[runtime]] = seconds["twin"] / seconds["folded"]
            if "unfolded" in seconds:
                found[name][f"{runtime}, unfolded"] = seconds["twin"] / seconds["unfolded"]
            if run["bytes"]:
                found[name][SIZE] = run["bytes"]["folded"] / run["bytes"]["twin"]
    rows = [run for runs in known.values() for run in runs.values()]
    used, loads = rows[0]["versions"], [row["load"] for row in rows]
    packages = ", ".join(f"{n} {used[n]}" for n in ("torch", "timm", "onnxruntime") if used.get(n))
    batches = ", ".join(map(str, sorted({row["batch_size"] for row in rows})))
    conditions = (
        f"{rows[0]['device']}, float32, batch {batches}, {packages}; "
        f"load average {min(loads):.1f} to {max(loads):.1f}"
    )
    return conditions, found


def write_page() -> None:
    """The tables between their marks in docs/performance.md and in the README, and the figures."""
    known = json.loads((RESULTS / "deploy.json").read_text(encoding="utf-8"))
    (conditions, found), (deploy_conditions, deployed) = ratios(), deploy_ratios(known)
    put(PAGE, "measured", table(found, ["batch", FLOPS, *MODES, MEMORY]))
    put(PAGE, "conditions", conditions + ".")
    put(PAGE, "deploy", f"{deploy_conditions}.\n\n{table(deployed, DEPLOY)}")
    order = [*MODELS, *sorted(found.keys() - set(MODELS))]
    both = {name: {**deployed.get(name, {}), **found[name]} for name in order}
    short = table(both, [FLOPS, *MODES[:3], RUNTIMES["onnx"]],
                  ["FLOPs", *MODES[:3], "ONNX Runtime, folded"])  # fmt: skip
    put(README, "times", short)
    save(bars(found, MODES, conditions, flops=True), ASSETS / "throughput.png")
    save(bars(deployed, list(RUNTIMES.values()), deploy_conditions), ASSETS / "deploy.png")


def put(path: Path, name: str, text: str) -> None:
    """Write `text` between the marks of that name in a page."""
    block = f"<!-- {name} -->\n\n{text}\n\n<!-- /{name} -->"
    page = path.read_text(encoding="utf-8")
    pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
    page, count = re.subn(pattern, lambda _: block, page, flags=re.DOTALL)
    if count != 1:
        raise UserError(f"{path} has {count} places for {name!r}, expected one")
    write_text(path, page)


def main(argv: Sequence[str] | None = None) -> int:
    CommandLine(description=__doc__.splitlines()[0]).parse_args(argv)
    write_page()
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
