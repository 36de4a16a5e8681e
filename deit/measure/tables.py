"""Results as tables for a terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deit.measure.measure import Result
from deit.measure.roofline import Bound
from deit.models.published import PUBLISHED

__all__ = ["Overview", "as_csv", "as_json", "print_comparisons"]

NOTHING = "-"
GAINS = {row.name: row.gain for row in PUBLISHED}


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def _rate(value: float) -> str:
    """Images a second, with about three significant digits."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _median(value: float | None, spread: float | None) -> str:
    """A measured rate and its spread in percent."""
    return NOTHING if value is None else f"{_rate(value)} ±{100 * (spread or 0):.1f}%"


def _change(ratio: float | None) -> str:
    """A ratio as a gain or loss: 1.06 is +6 %."""
    return NOTHING if ratio is None else f"{100 * (ratio - 1):+.0f}%"


class Overview:
    """The table of all networks, printed row by row as they are measured."""

    def __init__(
        self, console: Console, names: Sequence[str], *, timed: bool, trained: bool
    ) -> None:
        self._console, self._timed, self._trained = console, timed, trained
        self._name_width = max(map(len, names), default=0)

    def print_head(self) -> None:
        """The titles and units of the columns."""
        titles = ("params", "throughput", "FLOPs", "memory", "training")
        units = ("(M)", "(images/s)", "(G)", "(MB)", "(images/s)")
        self._print("network", titles, "bold")
        self._print("", units, "bold")

    def print_row(self, row: Result) -> None:
        """What is known of a network."""
        cells = (
            _number(row.params / 1e6, 1),
            _median(row.images_per_s, row.spread),
            _number(row.gflops, 2),
            _number(row.peak_memory_mb, 0),
            _median(row.train_images_per_s, row.train_spread),
        )
        self._print(row.model, cells)

    def _print(self, name: str, cells: Sequence[str], style: str = "") -> None:
        shown = (True, self._timed, True, self._timed, self._trained)
        padded = [
            cell.rjust(width)
            for cell, width, show in zip(cells, (6, 12, 6, 7, 12), shown, strict=True)
            if show
        ]
        line = "  ".join([name.ljust(self._name_width), *padded])
        self._console.print(Text(line.rstrip(), style), soft_wrap=True)


def print_comparisons(results: Mapping[str, Result], console: Console) -> None:
    """Tables of what the results say about each other, and their notes."""
    rows = list(results.values())
    timed = any(row.images_per_s is not None for row in rows)
    trained = any(row.train_images_per_s is not None for row in rows)
    compared = [row for row in rows if row.twin in results]
    if compared:
        _print_comparison(compared, results, timed, trained, console)
    if bounded := [row for row in rows if row.bound]:
        _print_roofline(bounded, trained, console)
    if any(row.notes for row in rows):
        console.print("\nNotes", style="bold")
    for row in rows:
        for note in row.notes:
            console.print(Text(f"{row.model}: {note}"), soft_wrap=True)


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


def _print_comparison(
    rows: Sequence[Result],
    results: Mapping[str, Result],
    timed: bool,
    trained: bool,
    console: Console,
) -> None:
    columns = {"gflops": "FLOPs"}
    columns |= {"images_per_s": "throughput"} if timed else {}
    columns |= {"train_images_per_s": "training"} if trained else {}
    columns |= {"peak_memory_mb": "memory"} if timed else {}
    lines = []
    for row in rows:
        gain = GAINS.get(row.model)
        ratios = [
            *map(row.ratios(results[row.twin]).get, columns),
            None if gain is None else 1 + gain,
        ]
        lines.append([row.model, *map(_change, ratios)])
    titles = [*columns.values(), "published\nthroughput"]
    _print_table("Compared with the ordinary twin", titles, lines, console)


def _print_roofline(rows: Sequence[Result], trained: bool, console: Console) -> None:
    columns = ["bound\n(images/s)", "reached", "limited\nby"]
    columns += ["training\n(images/s)", "reached"] if trained else []
    lines = []
    for row in rows:
        limit = "arithmetic" if row.bound.arithmetic >= 0.5 else "bandwidth"
        line = [row.model, *_reached(row.bound, row.images_per_s), limit]
        lines.append(line + (_reached(row.train_bound, row.train_images_per_s) if trained else []))
    _print_table("Roofline: what the measured peak rates allow", columns, lines, console)


def _reached(bound: Bound, rate: float | None) -> list[str]:
    share = NOTHING if rate is None else f"{100 * rate / bound.images_per_s:.0f}%"
    return [_rate(bound.images_per_s), share]


def _row(row: Result) -> dict[str, Any]:
    names = ("model", "params", "gflops", "images_per_s", "train_images_per_s", "peak_memory_mb")
    return {name: getattr(row, name) for name in (*names, "twin")}


def _details(row: Result) -> dict[str, Any]:
    """How a result came about, and how far from possible it is."""
    bound, train_bound = row.bound, row.train_bound
    return {
        "batch_size": row.batch_size,
        "spread": row.spread,
        "train_spread": row.train_spread,
        "train_peak_memory_mb": row.train_peak_memory_mb,
        "bound_images_per_s": bound and bound.images_per_s,
        "bound_by_arithmetic": bound and bound.arithmetic,
        "train_bound_images_per_s": train_bound and train_bound.images_per_s,
        "notes": row.notes,
    }


def as_json(results: Mapping[str, Result], settings: Mapping[str, Any]) -> str:
    """The report for programs; what a result has beyond its eight fields is in the settings."""
    rows = [_row(row) | {"ratios": row.ratios(results.get(row.twin))} for row in results.values()]
    details = {name: _details(row) for name, row in results.items()}
    report = {"settings": {**settings, "details": details}, "results": rows}
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


def as_csv(results: Mapping[str, Result]) -> str:
    """One line for each network, all that is known of it; what is absent is empty."""
    lines = []
    for row in results.values():
        ratios = row.ratios(results.get(row.twin))
        notes = {"notes": "; ".join(row.notes)}
        lines.append(
            _row(row) | {f"{k}_ratio": v for k, v in ratios.items()} | _details(row) | notes
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
