"""Results as tables for a terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deit.measure.measure import RATIOS, Result
from deit.models.published import PUBLISHED

NOTHING = "-"
GAINS = {row.name: row.gain for row in PUBLISHED}
# The fields that JSON has in `results`. The others are in the details of its settings.
PUBLIC = ("model", "params", "gflops", "images_per_s", "train_images_per_s", "peak_memory_mb",
          "twin")  # fmt: skip


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def _rate(value: float) -> str:
    """Images a second, with about three significant digits."""
    return _number(value, 0 if value >= 100 else 1 if value >= 10 else 2)


def _median(value: float | None, spread: float | None) -> str:
    """A measured rate and its spread in percent."""
    return NOTHING if value is None else f"{_rate(value)} ±{100 * (spread or 0):.1f}%"


def _change(ratio: float | None) -> str:
    """A ratio as a gain or loss: 1.06 is +6 %."""
    return NOTHING if ratio is None else f"{100 * (ratio - 1):+.0f}%"


# title: unit, width, and the text for a network
COLUMNS: dict[str, tuple[str, int, Callable[[Result], str]]] = {
    "params": ("(M)", 6, lambda row: _number(row.params / 1e6, 1)),
    "throughput": ("(images/s)", 12, lambda row: _median(row.images_per_s, row.spread)),
    "FLOPs": ("(G)", 6, lambda row: _number(row.gflops, 2)),
    "memory": ("(MB)", 7, lambda row: _number(row.peak_memory_mb, 0)),
    "training": ("(images/s)", 12, lambda row: _median(row.train_images_per_s, row.train_spread)),
}


def print_overview(
    rows: Iterable[Result], names: Sequence[str], console: Console, *, timed: bool, trained: bool
) -> dict[str, Result]:
    """Print the table of all networks, each line as soon as `rows` has its result; collect them."""
    name_width = max(map(len, names), default=0)
    hidden = {"throughput": not timed, "memory": not timed, "training": not trained}
    shown = {title: column for title, column in COLUMNS.items() if not hidden.get(title)}

    def show(name: str, cells: Iterable[str], style: str = "") -> None:
        padded = [c.rjust(width) for c, (_, width, _) in zip(cells, shown.values(), strict=True)]
        line = "  ".join([name.ljust(name_width), *padded])
        console.print(Text(line.rstrip(), style), soft_wrap=True)

    show("network", shown, "bold")
    show("", (unit for unit, _, _ in shown.values()), "bold")
    results = {}
    for row in rows:
        show(row.model, (text(row) for _, _, text in shown.values()))
        results[row.model] = row
    return results


def print_comparisons(results: Mapping[str, Result], console: Console) -> None:
    """Tables of what the results say about each other, and their notes."""
    rows = list(results.values())
    timed = any(row.images_per_s is not None for row in rows)
    trained = any(row.train_images_per_s is not None for row in rows)
    shown = ["gflops"] + ["images_per_s"] * timed + ["train_images_per_s"] * trained
    shown += ["peak_memory_mb"] * timed
    if compared := [row for row in rows if row.twin in results]:
        lines = []
        for row in compared:
            ratios, gain = row.ratios(results[row.twin]), GAINS.get(row.model)
            found = [*(ratios[name] for name in shown), None if gain is None else 1 + gain]
            lines.append([row.model, *map(_change, found)])
        columns = [*(RATIOS[name] for name in shown), "published\nthroughput"]
        _print_table("Compared with the ordinary twin", columns, lines, console)
    if bounded := [row for row in rows if row.bound_images_per_s]:
        columns = ["bound\n(images/s)", "reached", "limited\nby"]
        columns += ["training\n(images/s)", "reached"] * trained
        lines = []
        for row in bounded:
            limit = "arithmetic" if row.bound_by_arithmetic >= 0.5 else "bandwidth"
            line = [row.model, *_reached(row.bound_images_per_s, row.images_per_s), limit]
            reached = _reached(row.train_bound_images_per_s, row.train_images_per_s)
            lines.append([*line, *reached * trained])
        _print_table("Roofline: what the measured peak rates allow", columns, lines, console)
    if any(row.notes for row in rows):
        console.print("\nNotes", style="bold")
    for row in rows:
        for note in row.notes:
            console.print(Text(f"{row.model}: {note}"), soft_wrap=True)


def _reached(bound: float, rate: float | None) -> list[str]:
    return [_rate(bound), NOTHING if rate is None else f"{100 * rate / bound:.0f}%"]


def _print_table(
    title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], console: Console
) -> None:
    console.print(f"\n{title}", style="bold", highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("network", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def _fields(results: Mapping[str, Result]) -> Iterator[tuple[dict, dict, dict]]:
    """Of each result its public fields, its ratios to the twin's, and the others."""
    for row in results.values():
        details = {key: value for key, value in vars(row).items() if key != "matmuls"}
        public = {key: details.pop(key) for key in PUBLIC}
        yield public, row.ratios(results.get(row.twin)), details


def as_json(results: Mapping[str, Result], settings: Mapping[str, Any]) -> str:
    """The report for programs; what a result has beyond its eight fields is in the settings."""
    rows, details = [], {}
    for public, ratios, others in _fields(results):
        rows.append(public | {"ratios": ratios})
        details[public["model"]] = others
    report = {"settings": {**settings, "details": details}, "results": rows}
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


def as_csv(results: Mapping[str, Result]) -> str:
    """One line for each network, all that is known of it; what is absent is empty."""
    lines = []
    for public, ratios, others in _fields(results):
        ratios = {f"{name}_ratio": ratio for name, ratio in ratios.items()}
        lines.append(public | ratios | others | {"notes": "; ".join(others["notes"])})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
