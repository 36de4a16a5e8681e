"""report.md and report.png of benchmarks/gpu.py, from as many rows as there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.performance_page import markdown
from deit.saving import atomic_path, write_text

Row = dict[str, Any]


def write_report(folder: Path, rows: Sequence[Row]) -> tuple[Path, Path]:
    """Write both files; returns their paths."""
    table, figure = folder / "report.md", folder / "report.png"
    write_text(table, report(rows))
    with atomic_path(figure) as temporary:
        draw(rows).savefig(temporary, format="png", dpi=110)
    return table, figure


def report(rows: Sequence[Row]) -> str:
    """The tables, what they depend on, and what is missing in them."""
    parts = ["# Networks beside their ordinary twins"]
    for row in rows:
        if row["part"] in ("run", "conditions"):
            facts = (
                f"- {key}: {value}" for key, value in row.items() if key not in ("part", "what")
            )
            parts.append("\n".join(facts))
    timed = [
        [row["checkout"], row["part"], f"`{row['name']}`", row["what"], str(row["batch"]),
         str(row["mode"]), *(f"{row[role]['images_per_s']:.1f}" for role in ("twin", "ours")),
         f"{row['speed']:.2f}", f"{row['memory']:.2f}"]
        for row in rows if "speed" in row
    ]  # fmt: skip
    head = ["checkout", "part", "network", "", "batch", "compile mode", "twin, images/s",
            "ours, images/s", "speed over twin's", "memory over twin's"]  # fmt: skip
    errors = [
        [row["checkout"], f"`{row['name']}`", key, f"{value['logits']:.1e}",
         f"{value['gradients']:.1e}"]
        for row in rows if row.get("what") == "errors"
        for key, value in row.items() if isinstance(value, dict)
    ]  # fmt: skip
    profiles = [
        [row["checkout"], row["what"], f"{row['ms']:.2f}", str(row["kernels"]),
         "" if row["inductor_mb"] is None else f"{row['inductor_mb']:.0f}"]
        for row in rows if "by_kernel" in row
    ]  # fmt: skip
    slowest = [
        [row["checkout"], row["what"], f"{ms:.3f}", f"`{kernel[:90]}`"]
        for row in rows if "by_kernel" in row
        for kernel, ms in list(row["by_kernel"].items())[:8]
    ]  # fmt: skip
    trained = [
        [row["checkout"], f"`{row['what']}`", ", ".join(f"{s:.1f}" for s in row["seconds"]),
         ", ".join(f"{loss:.3f}" for loss in row["loss"])]
        for row in rows if row["part"] == "training" and "seconds" in row
    ]  # fmt: skip
    last = {(r.get("checkout"), r["part"], r.get("name"), r.get("what")): r for r in rows}
    missing = [
        f"- {row.get('checkout')}, {row['part']}, {row.get('name')}: "
        f"{row.get('error') or 'skipped, ' + row['skipped']}"
        for row in last.values() if "error" in row or "skipped" in row
    ]  # fmt: skip
    for title, columns, lines in (
        ("Rates and peak memory", head, timed),
        ("Relative errors against float64", ["checkout", "network", "of", "logits", "gradients"],
         errors),
        ("Profiles of a step", ["checkout", "step", "ms", "different kernels", "Inductor's MB"],
         profiles),
        ("The longest kernels", ["checkout", "step", "ms", "kernel"], slowest),
        ("Two epochs of deit/main.py", ["checkout", "network", "seconds", "loss"], trained),
    ):  # fmt: skip
        if lines:
            parts.append(f"## {title}\n\n{markdown(columns, lines)}")
    if missing:
        parts.append("## Missing\n\n" + "\n".join(missing))
    return "\n\n".join(parts) + "\n"


def draw(rows: Sequence[Row]) -> Figure:
    """Speed over the twin's: a bar for each timing and checkout."""
    timed = [row for row in rows if "speed" in row]
    figure = Figure(figsize=(9, 1.2 + 0.28 * max(len(timed), 1)), layout="constrained")
    axes = figure.subplots()
    colours = {"this": "#0072B2", "against": "#D55E00"}
    for i, row in enumerate(timed):
        axes.barh(i, row["speed"], color=colours[row["checkout"]])
    labels = [f"{r['name']}, {r['what']}, batch {r['batch']} ({r['checkout']})" for r in timed]
    axes.set_yticks(range(len(timed)), labels, fontsize="x-small")
    axes.invert_yaxis()
    axes.axvline(1, color="grey", linewidth=0.8)
    names = [row["device_name"] for row in rows if "device_name" in row]
    axes.set(xlabel="throughput over the ordinary twin's", title=names[-1] if names else "")
    return figure
