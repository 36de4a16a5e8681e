"""The publication's figure, from our data: throughput gain, and accuracy, over FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deit.errors import UserError
from deit.measure.measure import Result
from deit.models.published import PUBLISHED, twin_of
from deit.saving import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "draw", "make_figure"]

FORMATS = (".png", ".pdf", ".svg", ".eps", ".jpg", ".tif", ".webp")
# colours that people with colour-blindness can tell apart (Okabe and Ito)
COLOURS = {"ViT": "#0072B2", "ConvNeXt-iso": "#D55E00", "ResMLP": "#009E73"}
OTHER = dict(color="#444444", linestyle="", marker="x")
STYLES: dict[str, dict[str, Any]] = {
    "ordinary": dict(linestyle=":", marker="o", fillstyle="none"),
    "equivariant": dict(linestyle="-", marker="o"),
    "hybrid": dict(linestyle="--", marker="s"),
}
PUBLISHED_STYLE = dict(linestyle=":", marker="o", fillstyle="none", alpha=0.6)
Point = tuple[float, float, str]  # x, y and a text


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
    flops = {name: row.gflops for name, row in results.items() if row.gflops}
    _draw_gains(gains, _gains(results), flops)
    _draw_accuracies(accuracies, flops)
    title = "Throughput gain" + (f"\n{where}" if where else "")
    _finish(gains, flops, title, "throughput over the ordinary twin's (%)",
            "no network here was timed with its twin")  # fmt: skip
    _finish(accuracies, flops, "Accuracy", "published ImageNet-1K top-1 (%)",
            "no accuracy is published of these networks")  # fmt: skip
    return figure


def _gains(results: Mapping[str, Result]) -> dict[str, float]:
    """The measured gains in throughput over the twins, in percent."""
    ratios = {
        name: row.ratios(results.get(twin_of(name)))["images_per_s"]
        for name, row in results.items()
    }
    return {name: 100 * (ratio - 1) for name, ratio in ratios.items() if ratio is not None}


def _draw_gains(axes: Axes, gains: Mapping[str, float], flops: Mapping[str, float]) -> None:
    axes.axhline(0, color="black", linewidth=0.8)
    for family, colour in COLOURS.items():
        for kind in ("equivariant", "hybrid"):
            rows = [row for row in PUBLISHED if (row.family, row.kind) == (family, kind)]
            rows = [row for row in rows if row.name in flops]
            points = [
                (flops[row.name], gains[row.name], row.size) for row in rows if row.name in gains
            ]
            published = [
                (flops[row.name], 100 * row.gain, "" if points else row.size)
                for row in rows
                if row.gain is not None
            ]
            label = f"{family}, {kind}"
            _line(axes, points, label=label, color=colour, **STYLES[kind])
            label += ", published (A100)"
            _line(axes, published, label=label, color=colour, **PUBLISHED_STYLE)
    others = gains.keys() & flops.keys() - {row.name for row in PUBLISHED}
    _line(axes, [(flops[n], gains[n], n) for n in others], label="other networks", **OTHER)


def _draw_accuracies(axes: Axes, flops: Mapping[str, float]) -> None:
    for family, colour in COLOURS.items():
        for kind, style in STYLES.items():
            points = [
                (flops[row.name], row.top1, row.size)
                for row in PUBLISHED
                if (row.family, row.kind) == (family, kind)
                and row.name in flops
                and row.top1 is not None
            ]
            _line(axes, points, label=f"{family}, {kind}", color=colour, **style)


def _line(axes: Axes, points: list[Point], **style: Any) -> None:
    """Points joined from left to right, each with its text; nothing without points."""
    if not points:
        return
    from matplotlib.patheffects import withStroke

    x, y, _ = zip(*sorted(points), strict=True)
    axes.plot(x, y, markersize=5, linewidth=1.4, **style)
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for left, height, text in points:
        axes.annotate(
            text,
            (left, height),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=7.5 if len(text) < 5 else 6,
            color=style["color"],
            path_effects=halo,
        )


def _finish(axes: Axes, flops: Mapping[str, float], title: str, y: str, absent: str) -> None:
    """Titles, a logarithmic axis around the networks with round numbers, and the legend."""
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="GFLOPs an image", ylabel=y)
    low, high = min(flops.values(), default=1.0) / 1.6, max(flops.values(), default=1.0) * 1.6
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:  # below the panel, where it hides nothing
        legend = dict(fontsize=8, frameon=False, ncols=2, loc="upper center")
        axes.legend(bbox_to_anchor=(0.5, -0.13), **legend)
    else:
        axes.text(0.5, 0.5, absent, ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
