"""The rooms of the house, and which imports which: the one-way rule, and its drawing.

    python docs/architecture.py            # writes assets/architecture.png

The arrows are the imports that the source has, also those within functions. Of a way that leads
over other rooms the drawing shows only its steps: it leaves out what follows from other arrows.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from deit.cli import CommandLine
from deit.errors import one_line_errors
from deit.saving import atomic_path

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "assets" / "architecture.png"
# From below. A room may import from floors below its own, and from nothing else.
FLOORS: tuple[dict[str, str], ...] = (
    {
        "groups": "mirrors, rotations,\nand their irreps",
        "errors": "what a user did wrong,\nin one line",
    },
    {
        "equivariance": "how to act on features,\nand measure the error",
        "cli": "options and\ntheir types",
        "saving": "files that survive\na crash",
    },
    {"layers": "one equivariant\nlayer a file", "data": "from image files\nto batches"},
    {"models": "families, their sizes,\ntheir ordinary twins"},
    {"deploy": "folding; files for\nother runtimes"},
    {"train": "options, the step, checkpoints,\nresuming, processes, reports"},
    {"main": "train and evaluate"},
    {
        "verify": "is it equivariant?",
        "measure": "what does it cost?",
        "launch": "recipes, Slurm, status",
    },
    {
        "scripts": "test_equivariance.py, calculate_complexity.py, deit/export.py, "
        "deit/predict.py,\ndeit/run_with_submitit.py, and the console commands"
    },
)
SCRIPTS = ("calculate_complexity", "test_equivariance", "deit", "deit.commands", "deit.export",
           "deit.predict", "deit.run_with_submitit")  # fmt: skip
# folders that use the package, and that it must not use
OUTSIDE = ("assets", "benchmarks", "docs", "experiments", "tests")
Arrows = dict[tuple[str, str], list[str]]


def room_of(module: str) -> str | None:
    """The room of a module by its full name; None for other packages."""
    parts = module.split(".")
    if module in SCRIPTS or parts[0] in OUTSIDE:
        return "scripts"
    return parts[1] if parts[0] == "deit" else None


def find_arrows(root: Path) -> Arrows:
    """Room to room, and for each pair the imports: "deit/train/run.py:20 deit.data"."""
    files = [*sorted((root / "deit").rglob("*.py")), *sorted(root.glob("*.py"))]
    modules = {_name(file.relative_to(root)): file for file in files}
    arrows: Arrows = {}
    for name, file in modules.items():
        for line, imported in _imports(name, file, modules):
            pair = (room_of(name), room_of(imported))
            if None not in pair and pair[0] != pair[1]:
                place = f"{file.relative_to(root).as_posix()}:{line} {imported}"
                arrows.setdefault(pair, []).append(place)
    return arrows


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(name: str, file: Path, modules: Mapping[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import statement, wherever it stands."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in modules else base


def points_down(pair: tuple[str, str]) -> bool:
    """Whether the second room is on a lower floor than the first; not so for unknown rooms."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    return floor.get(pair[0], -1) > floor.get(pair[1], len(FLOORS))


def wrong_arrows(arrows: Arrows) -> list[str]:
    """The imports that do not point to a floor below, or are of or in an unknown room."""
    return [
        f"{place} ({pair[0]} must not import {pair[1]})"
        for pair, places in sorted(arrows.items())
        if not points_down(pair)
        for place in places
    ]


def steps(arrows: Arrows) -> list[tuple[str, str]]:
    """The pairs that point down and do not follow from others."""
    pairs = set(filter(points_down, arrows))
    reached: dict[str, set[str]] = {}
    for rooms in FLOORS:  # from below, so that what a room imports is known already
        for room in rooms:
            direct = {target for source, target in pairs if source == room}
            reached[room] = direct.union(*(reached[target] for target in direct))
    return sorted(
        (source, target)
        for source, target in pairs
        if not any((source, over) in pairs and target in reached[over] for over in reached)
    )


PLACES = {
    "groups": 2, "errors": 5.2, "equivariance": 0.8, "cli": 7.3, "saving": 9.35, "layers": 2.1,
    "data": 5.6, "models": 2.6, "deploy": 3, "train": 6.2, "main": 8.3, "verify": 0.8,
    "measure": 4.6, "launch": 8.3, "scripts": 5,
}  # fmt: skip
HEIGHT = 0.64  # of a box, where floors are 1.2 apart


def draw(pairs: list[tuple[str, str]]) -> Figure:
    """A box for each room, lower floors lower, and an arrow for each pair."""
    figure = Figure(figsize=(9, 9.6))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-0.4, 10.4), ylim=(-0.5, 1.2 * len(FLOORS) - 0.6))
    ax.axis("off")
    centre = {room: (PLACES[room], 1.2 * n) for n, rooms in enumerate(FLOORS) for room in rooms}
    widths = {room: 10 if room == "scripts" else 1.9 for rooms in FLOORS for room in rooms}
    widths["train"] = 2.8
    for source, target in pairs:
        (x, y), (to_x, to_y) = centre[source], centre[target]
        between = (x + to_x) / 2
        x, to_x = _nearest(x, widths[source], between), _nearest(to_x, widths[target], between)
        ax.annotate(
            "", (to_x, to_y + HEIGHT / 2), (x, y - HEIGHT / 2),
            arrowprops={"arrowstyle": "-|>", "color": "#777777", "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
    for rooms in FLOORS:
        for room, words in rooms.items():
            x, y = centre[room]
            box = {"boxstyle": "round,pad=0.02", "facecolor": "#EAF2FA", "edgecolor": "#0072B2"}
            corner = (x - widths[room] / 2, y - HEIGHT / 2)
            ax.add_patch(FancyBboxPatch(corner, widths[room], HEIGHT, **box))
            ax.text(x, y + 0.17, room, ha="center", va="center", fontsize=10, weight="bold")
            ax.text(x, y - 0.09, words, ha="center", va="center", fontsize=7.5, color="#444444")
    return figure


def _nearest(centre: float, width: float, wanted: float) -> float:
    """The place on a box's side, not quite at its ends, that is nearest to `wanted`."""
    reach = width / 2 - 0.5
    return min(max(wanted, centre - reach), centre + reach)


def described(pairs: list[tuple[str, str]]) -> str:
    """The arrows as text, which the picture holds: a test compares them."""
    return ", ".join(f"{source} > {target}" for source, target in pairs)


def main() -> int:
    CommandLine(description=__doc__.splitlines()[0]).parse_args()
    arrows = find_arrows(ROOT)
    pairs = steps(arrows)
    with atomic_path(FIGURE) as temporary:
        metadata = {"Software": None, "Description": described(pairs)}
        draw(pairs).savefig(temporary, format="png", dpi=110, metadata=metadata)
    print(FIGURE)
    wrong = wrong_arrows(arrows)
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
