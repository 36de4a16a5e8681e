"""Results as tables for a terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from deit.measure.measure import RATIOS, Result
from deit.models.published import PUBLISHED

NOTHING = "-"
GAINS = {row.name: 1 + row.gain for row in PUBLISHED if row.gain is not None}
# The fields that JSON has in `results`. The others are in the details of its settings.
PUBLIC = ("model", "params", "gflops", "images_per_s", "train_images_per_s", "peak_memory_mb",
          "twin")  # fmt: skip
# The two lines of its head, its width, and its text for a network.
Column = tuple[str, str, int, Callable[[Result], str]]


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


def _reached(rate: float | None, bound: float) -> str:
    return NOTHING if rate is None else f"{100 * rate / bound:.0f}%"


# Of what is known of a network by itself.
COLUMNS: dict[str, Column] = {
    "params": ("params", "(M)", 6, lambda row: _number(row.params / 1e6, 1)),
    "images_per_s": ("throughput", "(images/s)", 12,
                     lambda row: _median(row.images_per_s, row.spread)),
    "gflops": ("FLOPs", "(G)", 6, lambda row: _number(row.gflops, 2)),
    "peak_memory_mb": ("memory", "(MB)", 7, lambda row: _number(row.peak_memory_mb, 0)),
    "train_images_per_s": ("training", "(images/s)", 12,
                           lambda row: _median(row.train_images_per_s, row.train_spread)),
}  # fmt: skip


def print_table(
    rows: Iterable[Result], names: Iterable[str], columns: Sequence[Column], console: Console
) -> None:
    """Print the head, then the line of each network, one of `names`, as soon as `rows` has it."""
    name_width = max(map(len, names))

    def show(name: str, cells: Iterable[str], style: str = "") -> None:
        padded = [c.rjust(width) for c, (_, _, width, _) in zip(cells, columns, strict=True)]
        line = "  ".join([name.ljust(name_width), *padded])
        console.print(Text(line.rstrip(), style), soft_wrap=True)

    show("network", [first for first, *_ in columns], "bold")
    show("", [second for _, second, *_ in columns], "bold")
    for row in rows:
        show(row.model, [text(row) for *_, text in columns])


def print_comparisons(results: Mapping[str, Result], console: Console) -> None:
    """Tables of what the results say about each other, and their notes."""
    rows = list(results.values())
    shown = [name for name in RATIOS if any(getattr(row, name) is not None for row in rows)]

    def change(name: str) -> Callable[[Result], str]:
        return lambda row: _change(row.ratios(results[row.twin])[name])

    compared: list[Column] = [(RATIOS[name], "", 10, change(name)) for name in shown]
    compared.append(("published", "throughput", 10, lambda row: _change(GAINS.get(row.model))))
    bounds: list[Column] = [
        ("bound", "(images/s)", 10, lambda row: _rate(row.bound_images_per_s)),
        ("reached", "", 7, lambda row: _reached(row.images_per_s, row.bound_images_per_s)),
        ("limited", "by", 10,
         lambda row: "arithmetic" if row.bound_by_arithmetic >= 0.5 else "bandwidth"),
        ("training", "(images/s)", 10, lambda row: _rate(row.train_bound_images_per_s)),
        ("reached", "", 7,
         lambda row: _reached(row.train_images_per_s, row.train_bound_images_per_s)),
    ]  # fmt: skip
    trained = "train_images_per_s" in shown
    for title, members, columns in (
        ("Compared with the ordinary twin", [row for row in rows if row.twin in results], compared),
        ("Roofline: what the measured peak rates allow",
         [row for row in rows if row.bound_images_per_s], bounds if trained else bounds[:3]),
    ):  # fmt: skip
        if members:
            console.print(f"\n{title}", style="bold", highlight=False)
            print_table(members, [row.model for row in members], columns, console)
    if any(row.notes for row in rows):
        console.print("\nNotes", style="bold")
    for row in rows:
        for note in row.notes:
            console.print(Text(f"{row.model}: {note}"), soft_wrap=True)


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
