"""The publication's figure, from our data: throughput gain, and accuracy, over FLOPs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deit.errors import UserError
from deit.measure.measure import Result
from deit.models.published import PUBLISHED, twin_of
from deit.saving import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg", ".eps", ".jpg", ".tif", ".webp")
# colours that people with colour-blindness can tell apart (Okabe and Ito)
COLOURS = {"ViT": "#0072B2", "ConvNeXt-iso": "#D55E00", "ResMLP": "#009E73"}
OTHER = dict(color="#444444", linestyle="", marker="x")
OPEN = dict(linestyle=":", marker="o", fillstyle="none")
STYLES: dict[str, dict[str, Any]] = {
    "ordinary": OPEN,
    "equivariant": dict(linestyle="-", marker="o"),
    "hybrid": dict(linestyle="--", marker="s"),
}


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
    left, right = figure.subplots(1, 2)
    flops = {name: row.gflops for name, row in results.items() if row.gflops}
    gains = {}  # in throughput over the twin, in percent
    for name, row in results.items():
        ratio = row.ratios(results.get(twin_of(name)))["images_per_s"]
        if name in flops and ratio is not None:
            gains[name] = 100 * (ratio - 1)
    left.axhline(0, color="black", linewidth=0.8)
    for family, colour in COLOURS.items():
        for kind, style in STYLES.items():
            rows = [row for row in PUBLISHED if (row.family, row.kind) == (family, kind)]
            rows, label = [row for row in rows if row.name in flops], f"{family}, {kind}"
            measured = [(flops[r.name], gains[r.name], r.size) for r in rows if r.name in gains]
            published = [(flops[r.name], 100 * r.gain, "" if measured else r.size)
                         for r in rows if r.gain is not None]  # fmt: skip
            accuracies = [(flops[r.name], r.top1, r.size) for r in rows if r.top1 is not None]
            of_publication = dict(label=f"{label}, published (A100)", color=colour, alpha=0.6)
            _line(left, measured, label=label, color=colour, **style)
            _line(left, published, **of_publication, **OPEN)
            _line(right, accuracies, label=label, color=colour, **style)
    others = gains.keys() - {row.name for row in PUBLISHED}
    _line(left, [(flops[name], gains[name], name) for name in others], label="other networks",
          **OTHER)  # fmt: skip
    title = "Throughput gain" + (f"\n{where}" if where else "")
    _finish(left, flops.values(), title, "throughput over the ordinary twin's (%)",
            "no network here was timed with its twin")  # fmt: skip
    _finish(right, flops.values(), "Accuracy", "published ImageNet-1K top-1 (%)",
            "no accuracy is published of these networks")  # fmt: skip
    return figure


def _line(axes: Axes, points: list[tuple[float, float, str]], **style: Any) -> None:
    """Points joined from left to right, each with its text; nothing without points."""
    if not points:
        return
    from matplotlib.patheffects import withStroke

    x, y, _ = zip(*sorted(points), strict=True)
    axes.plot(x, y, markersize=5, linewidth=1.4, **style)
    common = dict(textcoords="offset points", ha="center", color=style["color"],
                  path_effects=[withStroke(linewidth=2.5, foreground="white")])  # fmt: skip
    for left, height, text in points:
        axes.annotate(text, (left, height), (0, 6), fontsize=7.5 if len(text) < 5 else 6, **common)


def _finish(axes: Axes, flops: Iterable[float], title: str, y: str, absent: str) -> None:
    """Titles, a logarithmic axis around the networks with round numbers, and the legend."""
    from matplotlib.ticker import LogLocator

    axes.set_title(title, fontsize=10)
    axes.set(xlabel="GFLOPs an image", ylabel=y)
    axes.set_xscale("log")
    axes.set_xlim(min(flops) / 1.6, max(flops) * 1.6)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:  # below the panel, where it hides nothing
        legend = dict(fontsize=8, frameon=False, ncols=2, loc="upper center")
        axes.legend(bbox_to_anchor=(0.5, -0.13), **legend)
    else:
        axes.text(0.5, 0.5, absent, ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
