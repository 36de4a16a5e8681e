"""The publication's figure, from our data: throughput gain, and accuracy, over FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, floor, log10
from pathlib import Path
from typing import TYPE_CHECKING

from deit.errors import UserError
from deit.measure.measure import Result
from deit.measure.published import PUBLISHED, Published, twin_of
from deit.saving import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "draw", "make_figure"]

FORMATS = (".png", ".pdf", ".svg", ".eps", ".jpg", ".tif", ".webp")
# colours that people with colour-blindness can tell apart (Okabe and Ito)
COLOURS = {"ViT": "#0072B2", "ConvNeXt-iso": "#D55E00", "ResMLP": "#009E73"}
OTHER = "#444444"
STYLES = {
    "ordinary": dict(linestyle=":", marker="o", fillstyle="none"),
    "equivariant": dict(linestyle="-", marker="o"),
    "hybrid": dict(linestyle="--", marker="s"),
}
PUBLISHED_STYLE = dict(linestyle=":", marker="o", fillstyle="none", alpha=0.6)


def draw(results: Mapping[str, Result], path: str | Path, where: str) -> None:
    """Write the figure to `path`, in the format of its suffix.

    Args:
        where: device and settings of the throughput, for the title.

    Raises:
        UserError: nothing to draw.
    """
    path = Path(path)
    if all(row.gflops is None for row in results.values()):
        raise UserError(f"--plot {path}: there are no FLOPs to draw anything over")
    with atomic_path(path) as temporary:
        figure = make_figure(results, where)
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=160)


def make_figure(results: Mapping[str, Result], where: str = "") -> Figure:
    """Two panels: throughput gain, measured and published, and published accuracy, over FLOPs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    gains, accuracies = figure.subplots(1, 2)
    _draw_gains(gains, results, where)
    _draw_accuracies(accuracies, results)
    flops = [row.gflops for row in results.values() if row.gflops]
    for axes, absent in (
        (gains, "no network here was timed with its twin"),
        (accuracies, "no accuracy is published of these networks"),
    ):
        _scale(axes, flops)
        if not axes.get_legend_handles_labels()[0]:
            axes.text(0.5, 0.5, absent, ha="center", va="center", transform=axes.transAxes)
            axes.set_yticks([])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _scale(axes: Axes, flops: list[float]) -> None:
    """A logarithmic axis around the networks, with round numbers."""
    low, high = min(flops, default=1.0) / 1.6, max(flops, default=1.0) * 1.6
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _published(family: str, kind: str, results: Mapping[str, Result]) -> list[Published]:
    """Published networks of a family that have FLOPs here, small to large."""
    rows = [row for row in PUBLISHED if row.family == family and row.kind == kind]
    rows = [row for row in rows if row.name in results and results[row.name].gflops is not None]
    return sorted(rows, key=lambda row: results[row.name].gflops)


def _draw_gains(axes: Axes, results: Mapping[str, Result], where: str) -> None:
    axes.axhline(0, color="black", linewidth=0.8)
    drawn = set()
    for family, colour in COLOURS.items():
        for kind in ("equivariant", "hybrid"):
            rows = _published(family, kind, results)
            measured = [
                (row, gain) for row in rows if (gain := _gain(row.name, results)) is not None
            ]
            points = [(results[row.name].gflops, 100 * gain, row.size) for row, gain in measured]
            _line(axes, points, colour, f"{family}, {kind}", **STYLES[kind])
            drawn.update(row.name for row in rows)
            points = [
                (results[row.name].gflops, 100 * row.gain, "" if measured else row.size)
                for row in rows
                if row.gain is not None
            ]
            _line(axes, points, colour, f"{family}, {kind}, published (A100)", **PUBLISHED_STYLE)
    points = [
        (results[name].gflops, 100 * gain, name)
        for name in results
        if name not in drawn
        and results[name].gflops is not None
        and (gain := _gain(name, results)) is not None
    ]
    _line(axes, points, OTHER, "other networks", linestyle="", marker="x")
    axes.set_xlabel("GFLOPs an image")
    axes.set_ylabel("throughput over the ordinary twin's (%)")
    axes.set_title("Throughput gain" + (f"\n{where}" if where else ""), fontsize=10)
    _legend(axes)


def _gain(name: str, results: Mapping[str, Result]) -> float | None:
    """The measured gain in throughput over the twin, as a fraction."""
    ratio = results[name].ratios(results.get(twin_of(name)))["images_per_s"]
    return None if ratio is None else ratio - 1


def _draw_accuracies(axes: Axes, results: Mapping[str, Result]) -> None:
    for family, colour in COLOURS.items():
        for kind, style in STYLES.items():
            rows = [row for row in _published(family, kind, results) if row.top1 is not None]
            points = [(results[row.name].gflops, row.top1, row.size) for row in rows]
            _line(axes, points, colour, f"{family}, {kind}", **style)
    axes.set_xlabel("GFLOPs an image")
    axes.set_ylabel("published ImageNet-1K top-1 (%)")
    axes.set_title("Accuracy", fontsize=10)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Below the panel, where it hides nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13)
        )


def _line(
    axes: Axes, points: list[tuple[float, float, str]], colour: str, label: str, **style
) -> None:
    """Points (x, y, text) joined by a line, each with its text; nothing without points."""
    if not points:
        return
    x, y, _ = zip(*points, strict=True)
    axes.plot(x, y, color=colour, label=label, markersize=5, linewidth=1.4, **style)
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]
    for left, height, text in points:
        axes.annotate(
            text,
            (left, height),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=7.5 if len(text) < 5 else 6,
            color=colour,
            path_effects=halo,
        )
