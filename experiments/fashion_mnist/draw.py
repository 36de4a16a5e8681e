"""Tables and figures of the Fashion-MNIST study, from its result files.

    python experiments/fashion_mnist/draw.py            # the full grid's, or else the quick one's
    python experiments/fashion_mnist/draw.py --results DIR --figures DIR

Writes summary.csv and summary.md beside the results, fashion_mnist_*.png into the figures' folder,
and brings the tables in docs/results.md up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from deit.cli import CommandLine, OptionGroup
from deit.errors import UserError, one_line_errors
from deit.saving import write_text
from experiments.fashion_mnist.figures import draw_all
from experiments.fashion_mnist.summary import as_csv, as_markdown, read

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
TITLES = {
    "main": "All networks, trained on the whole training set with flip augmentation",
    "differences": "Difference to the ordinary network of the family (paired by seed)",
    "flip": "With and without flip augmentation",
    "fractions": "Parts of the training set",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandLine(description=__doc__.splitlines()[0])
    group = OptionGroup(parser, "files")
    group.add(
        "--results",
        str,
        "",
        "DIR",
        "result files (default: those of the full grid if it was trained, else the quick one)",
    )
    group.add("--figures", str, str(ROOT / "assets"), "DIR", "where the figures go")
    group.add("--report", str, str(ROOT / "docs" / "results.md"), "FILE",
              "text whose tables, between marks, are brought up to date ('': none)")  # fmt: skip
    args = parser.parse_args(argv)
    folder = Path(args.results) if args.results else default_results()
    rows = read(folder)
    tables = as_markdown(rows)
    write_text(folder / "summary.csv", as_csv(rows))
    write_text(folder / "summary.md", summary(tables))
    report = Path(args.report)
    if report.is_file():  # an empty name is the current folder
        write_text(report, with_tables(report.read_text(encoding="utf-8"), tables))
    figures = Path(args.figures)
    figures.mkdir(parents=True, exist_ok=True)
    written = [folder / "summary.csv", folder / "summary.md", *draw_all(rows, figures)]
    print("\n".join(str(path) for path in written))
    return 0


def default_results() -> Path:
    for name in ("full", "quick"):
        if any((RESULTS / name).glob("*-seed*.json")):
            return RESULTS / name
    raise UserError("no results yet: run experiments/fashion_mnist/run.py first")


def summary(tables: Mapping[str, str]) -> str:
    """All tables as one text; mean ± standard error over seeds."""
    return "\n".join(f"### {TITLES[name]}\n\n{table}" for name, table in tables.items())


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """`text` with what stands between <!-- NAME --> and <!-- /NAME --> replaced by the tables."""
    for name, table in tables.items():
        block = f"<!-- {name} -->\n\n{table}\n<!-- /{name} -->"
        pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
        text = re.sub(pattern, lambda match, block=block: block, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
