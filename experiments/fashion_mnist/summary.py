"""From result files to tables: means over seeds with their standard errors."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from math import log, sqrt
from pathlib import Path
from statistics import linear_regression, mean, stdev
from typing import Any

from deit.errors import UserError
from experiments.fashion_mnist.networks import Network

MEASURES = ("accuracy", "accuracy_mirrored", "agreement", "seconds")
FAMILIES = {"vit": "ViT", "resmlp": "ResMLP", "convnext": "ConvNeXt-iso"}
KINDS = {
    "ordinary": "ordinary",
    "equivariant": "equivariant",
    "hybrid": "hybrid",
    "invariant_early": "invariant-early",
}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error (None for a single seed)."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        error = stdev(values) / sqrt(len(values)) if len(values) > 1 else None
        return cls(mean(values), error)

    def text(self, digits: int = 2, sign: str = "") -> str:
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{error}"


@dataclass(frozen=True)
class Row:
    """All seeds of one cell of the grid."""

    network: Network
    flip: bool
    fraction: float
    parameters: int
    flops: float
    results: tuple[dict[str, Any], ...]

    @property
    def seeds(self) -> dict[int, dict[str, Any]]:
        return {result["cell"]["seed"]: result for result in self.results}

    def estimate(self, measure: str) -> Estimate:
        return Estimate.of([result[measure] for result in self.results])

    @property
    def label(self) -> str:
        """Kind, and what is special about its size."""
        network, kind = self.network, KINDS[self.network.kind]
        if network.width != network.like:
            return f"{kind}, wider"
        return f"{kind}, deeper" if network.depth != self.plan["depth"] else kind

    @property
    def plan(self) -> dict[str, Any]:
        return self.results[0]["plan"]


@lru_cache
def flops(network: Network) -> float:
    return network.flops()


def read(folder: Path) -> list[Row]:
    """The results in a folder, by network, flip and fraction, small networks first.

    Raises:
        UserError: there is none, or they are of different plans.
    """
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed*.json"))]
    if not results:
        raise UserError(f"no results in {folder}: run experiments/fashion_mnist/run.py first")
    if any(result["plan"] != results[0]["plan"] for result in results):
        raise UserError(f"the results in {folder} are of different plans: train the grid again")
    groups: dict[tuple[Network, bool, float], list[dict[str, Any]]] = {}
    names = [field.name for field in fields(Network)]
    for result in results:
        cell = result["cell"]
        network = Network(**{name: cell[name] for name in names})
        groups.setdefault((network, cell["flip"], cell["fraction"]), []).append(result)
    rows = [
        Row(network, flip, fraction, found[0]["parameters"], flops(network), tuple(found))
        for (network, flip, fraction), found in groups.items()
    ]
    return sorted(rows, key=_order)


def _order(row: Row) -> tuple:
    network = row.network
    sizes = (network.like, list(KINDS).index(network.kind), network.width, network.depth)
    return (list(FAMILIES).index(network.family), *sizes, -row.fraction, not row.flip)


def twin(row: Row, rows: Iterable[Row]) -> Row | None:
    """The ordinary network that it is compared with, trained in the same way."""
    for other in rows:
        ours, theirs = row.network, other.network
        same = (other.flip, other.fraction, theirs.family) == (row.flip, row.fraction, ours.family)
        if same and theirs.kind == "ordinary" and theirs.width == ours.like:
            return other if ours.kind != "ordinary" else None
    return None


def difference(row: Row, other: Row, measure: str) -> Estimate:
    """Ours minus the other's, by seeds: those of one seed saw the same batches."""
    shared = sorted(row.seeds.keys() & other.seeds.keys())
    return Estimate.of([row.seeds[s][measure] - other.seeds[s][measure] for s in shared])


def above_line(row: Row, rows: Iterable[Row]) -> Estimate | None:
    """Accuracy above the line through the ordinary networks of its family, trained in the same way.

    The line is that of least squares over the logarithm of FLOPs, one for each seed, and goes on
    beyond the ordinary networks. None if there are fewer than two of them.
    """
    others = [
        other
        for other in rows
        if other.network.family == row.network.family and other.network.kind == "ordinary"
        and (other.flip, other.fraction) == (row.flip, row.fraction)
    ]  # fmt: skip
    if len({other.flops for other in others}) < 2:
        return None
    costs = [log(other.flops) for other in others]
    shared = sorted(set.intersection(*(set(other.seeds) for other in (row, *others))))
    above = []
    for seed in shared:
        line = linear_regression(costs, [other.seeds[seed]["accuracy"] for other in others])
        expected = line.slope * log(row.flops) + line.intercept
        above.append(row.seeds[seed]["accuracy"] - expected)
    return Estimate.of(above) if above else None


def as_csv(rows: Sequence[Row]) -> str:
    """One line a row, everything in full."""
    text = io.StringIO()
    columns = ["network", "family", "kind", "width", "depth", "parameters", "mflops", "flip"]
    columns += ["training_images", "seeds"]
    columns += [column for name in MEASURES for column in (name, f"{name}_se")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        network = row.network
        cells = [network.name, network.family, network.kind, network.width, network.depth]
        cells += [row.parameters, f"{row.flops / 1e6:.4f}", int(row.flip)]
        cells += [row.results[0]["training_images"], len(row.results)]
        for name in MEASURES:
            value = row.estimate(name)
            cells += [f"{value.mean:.4f}", "" if value.error is None else f"{value.error:.4f}"]
        writer.writerow(cells)
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> dict[str, str]:
    """The tables of the report by name: `main`, `differences`, `flip`, `fractions`."""
    main = [row for row in rows if row.flip and row.fraction == 1]
    pairs = [(row, twin(row, rows)) for row in main]
    pairs = [(row, other) for row, other in pairs if other and row.seeds.keys() & other.seeds]
    both = {row.network for row in rows if not row.flip}
    parts = {row.network for row in rows if row.fraction < 1}
    tables = {
        "main": _table(main, NETWORK | COST | ACCURACY | TIME),
        "differences": _differences(pairs, rows),
        "flip": _table(
            [row for row in rows if row.network in both and row.fraction == 1],
            NETWORK | {"flip augmentation": lambda row: "on" if row.flip else "off"} | ACCURACY,
        ),
        "fractions": _table(
            [row for row in rows if row.network in parts and row.flip],
            NETWORK | {"training images": lambda row: f"{row.results[0]['training_images']:,}"}
            | ACCURACY,
        ),
    }  # fmt: skip
    return {name: table for name, table in tables.items() if table}


Columns = dict[str, Callable[[Row], str]]
NETWORK: Columns = {
    "network": lambda row: f"{FAMILIES[row.network.family]}, {row.label}",
    "width": lambda row: str(row.network.width),
}
COST: Columns = {
    "parameters (k)": lambda row: f"{row.parameters / 1e3:.0f}",
    "MFLOPs": lambda row: f"{row.flops / 1e6:.2f}",
}
ACCURACY: Columns = {
    "seeds": lambda row: str(len(row.results)),
    "test accuracy (%)": lambda row: row.estimate("accuracy").text(),
    "on mirrored images (%)": lambda row: row.estimate("accuracy_mirrored").text(),
    "same answer for both (%)": lambda row: row.estimate("agreement").text(),
}
TIME: Columns = {"training (s)": lambda row: row.estimate("seconds").text(1)}


def _table(rows: Sequence[Row], columns: Columns) -> str:
    lines = [[function(row) for function in columns.values()] for row in rows]
    return _lines(list(columns), lines) if lines else ""


def _differences(pairs: Sequence[tuple[Row, Row]], rows: Sequence[Row]) -> str:
    header = ["network", "width", "FLOPs", "seeds", "test accuracy (points)"]
    header += ["above the ordinary line", "training time"]
    lines = []
    for row, other in pairs:
        time = row.estimate("seconds").mean / other.estimate("seconds").mean
        above = above_line(row, rows)
        lines.append(
            [
                *(function(row) for function in NETWORK.values()),
                f"{100 * row.flops / other.flops:.0f} %",
                str(len(row.seeds.keys() & other.seeds.keys())),
                difference(row, other, "accuracy").text(sign="+"),
                "" if above is None else above.text(sign="+"),
                f"{100 * time:.0f} %",
            ]
        )
    return _lines(header, lines) if lines else ""


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (header, rule, *rows))
