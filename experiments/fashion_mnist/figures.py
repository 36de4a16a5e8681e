"""The figures of the Fashion-MNIST study. Error bars are standard errors over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deit.saving import atomic_path
from experiments.fashion_mnist.summary import FAMILIES, KINDS, Estimate, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# colours that people with colour-blindness can tell apart (Okabe and Ito)
COLOURS = {
    "ordinary": "#444444",
    "equivariant": "#0072B2",
    "hybrid": "#D55E00",
    "invariant_early": "#009E73",
}
MARKERS = {"ordinary": "o", "equivariant": "s", "hybrid": "^", "invariant_early": "D"}


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write every figure that the rows have something for; returns their paths."""
    figures: dict[str, Figure] = {}
    if any(row.flip and row.fraction == 1 for row in rows):
        figures |= {"flops": accuracy_over_flops(rows), "time": accuracy_over_time(rows)}
    if any(not row.flip and row.network.family == "vit" for row in rows):
        figures["mirror"] = mirrored_images(rows)
    if any(row.fraction < 1 for row in rows):
        figures["data"] = data_efficiency(rows)
    paths = []
    for name, figure in figures.items():
        path = folder / f"fashion_mnist_{name}.png"
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
        paths.append(path)
    return paths


def _figure(panels: int, width: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bars(ax: Axes, x: list[float], values: list[Estimate], kind: str, **style) -> None:
    ax.errorbar(
        x,
        [value.mean for value in values],
        [value.error or 0 for value in values],
        color=COLOURS[kind],
        **({"marker": MARKERS[kind], "markersize": 5, "capsize": 2.5, "linewidth": 1.3} | style),
    )


def _by_family(rows: Sequence[Row], x: Callable[[Row], float], xlabel: str, title: str) -> Figure:
    """A panel for each family: accuracy over `x`; networks of one kind are joined by a line."""
    rows = [row for row in rows if row.flip and row.fraction == 1]
    families = [family for family in FAMILIES if any(r.network.family == family for r in rows)]
    figure, axes = _figure(len(families), 3.6 * len(families))
    for ax, family in zip(axes, families, strict=True):
        for kind in KINDS:
            chosen = [r for r in rows if (r.network.family, r.network.kind) == (family, kind)]
            chosen.sort(key=x)
            if chosen:
                values = [row.estimate("accuracy") for row in chosen]
                style = {"linestyle": "-" if len(chosen) > 1 else "none"}
                _bars(ax, [x(row) for row in chosen], values, kind, label=KINDS[kind], **style)
            for row in chosen:
                ax.annotate(
                    f"{row.network.width}" + (", deep" if "deeper" in row.label else ""),
                    (x(row), row.estimate("accuracy").mean),
                    (5, -10),
                    textcoords="offset points",
                    fontsize=7,
                    color=COLOURS[kind],
                )
        ax.set_title(FAMILIES[family], fontsize=10)
        ax.set_xlabel(xlabel)
        ax.legend(frameon=False, fontsize=8, loc="lower right")
        ax.margins(x=0.12)
    axes[0].set_ylabel("test accuracy (%)")
    figure.suptitle(title, fontsize=10)
    return figure


def accuracy_over_flops(rows: Sequence[Row]) -> Figure:
    """Accuracy over the cost of one image; the numbers at the points are widths."""
    title = "Fashion-MNIST: accuracy over FLOPs (numbers: width)"
    return _by_family(rows, lambda row: row.flops / 1e6, "MFLOPs an image", title)


def accuracy_over_time(rows: Sequence[Row]) -> Figure:
    """Accuracy over what the training took."""
    found = rows[0].results[0]["environment"]
    where = f"one thread of {found['processor']}" if found["device"] == "cpu" else found["device"]
    title = f"Fashion-MNIST: accuracy over training time on {where} (numbers: width)"
    clock = "CPU seconds of training" if found["device"] == "cpu" else "seconds of training"
    return _by_family(rows, lambda row: row.estimate("seconds").mean, clock, title)


def mirrored_images(rows: Sequence[Row]) -> Figure:
    """Accuracy on test images and on their mirror images, and how often the answers agree."""
    rows = [row for row in rows if row.fraction == 1 and row.label in KINDS.values()]
    rows = [row for row in rows if row.network.family == "vit"]
    width = max(row.network.width for row in rows if not row.flip)
    rows = [row for row in rows if row.network.width == width]
    labels = [f"{row.label}\nflip {'on' if row.flip else 'off'}" for row in rows]
    figure, (accuracy, agreement) = _figure(2, 9.6)
    for place, row in enumerate(rows):
        kind = row.network.kind
        _bars(accuracy, [place - 0.12], [row.estimate("accuracy")], kind)
        mirrored = row.estimate("accuracy_mirrored")
        _bars(accuracy, [place + 0.12], [mirrored], kind, fillstyle="none")
        _bars(agreement, [place], [row.estimate("agreement")], kind)
    for ax in (accuracy, agreement):
        ax.set_xticks(range(len(rows)), labels, fontsize=7.5)
        ax.margins(x=0.1)
    accuracy.set_ylabel("accuracy (%)")
    accuracy.set_title("on test images (full) and their mirror images (hollow)", fontsize=10)
    agreement.set_ylabel("of the test images (%)")
    agreement.set_title("same answer for an image and its mirror image", fontsize=10)
    figure.suptitle(f"Fashion-MNIST: ViTs of width {width} on mirrored images", fontsize=10)
    return figure


def data_efficiency(rows: Sequence[Row]) -> Figure:
    """Accuracy over the number of training images, at the same number of updates."""
    parts = {row.network for row in rows if row.fraction < 1}
    rows = [row for row in rows if row.network in parts and row.flip]
    families = [family for family in FAMILIES if any(n.family == family for n in parts)]
    figure, axes = _figure(len(families), 3.0 + 2.6 * len(families))
    for ax, family in zip(axes, families, strict=True):
        for kind in KINDS:
            chosen = [r for r in rows if (r.network.family, r.network.kind) == (family, kind)]
            chosen.sort(key=lambda row: row.fraction)
            if chosen:
                images = [row.results[0]["training_images"] for row in chosen]
                values = [row.estimate("accuracy") for row in chosen]
                _bars(ax, images, values, kind, label=KINDS[kind])
        ax.set_xscale("log")
        sizes = sorted({row.results[0]["training_images"] for row in rows})
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.minorticks_off()
        ax.set_title(FAMILIES[family], fontsize=10)
        ax.set_xlabel("training images")
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    axes[0].set_ylabel("test accuracy (%)")
    figure.suptitle("Fashion-MNIST: data efficiency, equal numbers of updates", fontsize=10)
    return figure
