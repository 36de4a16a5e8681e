"""Results as tables for a terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deit.measure.measure import Result
from deit.measure.published import PUBLISHED
from deit.measure.roofline import Bound

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


def _train_median(row: Result) -> str:
    return _median(row.train_images_per_s, row.train_spread)


def _change(ratio: float | None) -> str:
    """A ratio as a gain or loss: 1.06 is +6 %."""
    return NOTHING if ratio is None else f"{100 * (ratio - 1):+.0f}%"


class Overview:
    """The table of all networks, printed row by row as they are measured."""

    def __init__(
        self, console: Console, names: Sequence[str], *, timed: bool, trained: bool
    ) -> None:
        self._console = console
        # title, unit, width, cell
        columns: list[tuple[str, str, int, Callable[[Result], str]]] = [
            ("network", "", -max(map(len, names), default=0), lambda row: row.model),
            ("params", "(M)", 6, lambda row: _number(row.params / 1e6, 1)),
        ]
        if timed:
            columns += [
                ("throughput", "(images/s)", 12, lambda row: _median(row.images_per_s, row.spread))
            ]
        columns += [("FLOPs", "(G)", 6, lambda row: _number(row.gflops, 2))]
        if timed:
            columns += [("memory", "(MB)", 7, lambda row: _number(row.peak_memory_mb, 0))]
        if trained:
            columns += [("training", "(images/s)", 12, _train_median)]
        self._columns = columns

    def print_head(self) -> None:
        """The titles and units of the columns."""
        self._print([title for title, _, _, _ in self._columns], "bold")
        self._print([unit for _, unit, _, _ in self._columns], "bold")

    def print_row(self, row: Result) -> None:
        """What is known of a network."""
        self._print([cell(row) for _, _, _, cell in self._columns])

    def _print(self, cells: Sequence[str], style: str = "") -> None:
        widths = [width for _, _, width, _ in self._columns]
        padded = [
            cell.ljust(-width) if width < 0 else cell.rjust(width)
            for cell, width in zip(cells, widths, strict=True)
        ]
        self._console.print(Text("  ".join(padded).rstrip(), style), soft_wrap=True)


def print_comparisons(results: Mapping[str, Result], console: Console) -> None:
    """Tables of what the results say about each other, and their notes."""
    rows = list(results.values())
    timed = any(row.images_per_s is not None for row in rows)
    trained = any(row.train_images_per_s is not None for row in rows)
    compared = [row for row in rows if row.twin in results]
    if compared:
        table = _comparison(compared, results, timed, trained)
        _show(console, "Compared with the ordinary twin", table)
    if any(row.bound for row in rows):
        _show(console, "Roofline: what the measured ceilings allow", _roofline(rows, trained))
    if any(row.notes for row in rows):
        console.print("\nNotes", style="bold")
    for row in rows:
        for note in row.notes:
            console.print(Text(f"{row.model}: {note}"), soft_wrap=True)


def _show(console: Console, title: str, table: Table) -> None:
    console.print(f"\n{title}", style="bold", highlight=False)
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("network", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _comparison(
    rows: Sequence[Result], results: Mapping[str, Result], timed: bool, trained: bool
) -> Table:
    columns = ["FLOPs", *(["throughput"] if timed else []), *(["training"] if trained else [])]
    columns += ["memory"] if timed else []
    table = _table(*columns, "published\nthroughput")
    for row in rows:
        ratios = row.ratios(results[row.twin])
        names = ["gflops", *(["images_per_s"] if timed else [])]
        names += ["train_images_per_s"] if trained else []
        names += ["peak_memory_mb"] if timed else []
        gain = GAINS.get(row.model)
        cells = [_change(ratios[name]) for name in names]
        table.add_row(row.model, *cells, _change(None if gain is None else 1 + gain))
    return table


def _roofline(rows: Sequence[Result], trained: bool) -> Table:
    columns = ["bound\n(images/s)", "reached", "limited\nby"]
    columns += ["training\n(images/s)", "reached"] if trained else []
    table = _table(*columns)
    for row in rows:
        if row.bound is None:
            continue
        limit = "arithmetic" if row.bound.arithmetic >= 0.5 else "bandwidth"
        cells = [*_reached(row.bound, row.images_per_s), limit]
        cells += _reached(row.train_bound, row.train_images_per_s) if trained else []
        table.add_row(row.model, *cells)
    return table


def _reached(bound: Bound, rate: float | None) -> list[str]:
    share = NOTHING if rate is None else f"{100 * rate / bound.images_per_s:.0f}%"
    return [_rate(bound.images_per_s), share]


def as_json(results: Mapping[str, Result], settings: Mapping[str, Any]) -> str:
    """The report for programs; what a result has beyond its eight fields is in the settings."""
    rows = [
        {
            "model": row.model,
            "params": row.params,
            "gflops": row.gflops,
            "images_per_s": row.images_per_s,
            "train_images_per_s": row.train_images_per_s,
            "peak_memory_mb": row.peak_memory_mb,
            "twin": row.twin,
            "ratios": row.ratios(results.get(row.twin)),
        }
        for row in results.values()
    ]
    details = {name: _details(row) for name, row in results.items()}
    report = {"settings": {**settings, "details": details}, "results": rows}
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


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


def as_csv(results: Mapping[str, Result]) -> str:
    """One line for each network, all that is known of it; what is absent is empty."""
    text = io.StringIO()
    writer: csv.DictWriter | None = None
    for row in results.values():
        ratios = row.ratios(results.get(row.twin))
        line = {
            "model": row.model,
            "params": row.params,
            "gflops": row.gflops,
            "images_per_s": row.images_per_s,
            "train_images_per_s": row.train_images_per_s,
            "peak_memory_mb": row.peak_memory_mb,
            "twin": row.twin,
            **{f"{name}_ratio": value for name, value in ratios.items()},
            **{**_details(row), "notes": "; ".join(row.notes)},
        }
        if writer is None:
            writer = csv.DictWriter(text, list(line), lineterminator="\n")
            writer.writeheader()
        writer.writerow(line)
    return text.getvalue()
