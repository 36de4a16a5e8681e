"""Draw the figures that explain the method, from the layers themselves.

    python assets/draw.py             # writes method.png and patch_embedding.png beside this file

The figures of the Fashion-MNIST study come from experiments/fashion_mnist/draw.py, those of speed
from calculate_complexity.py --plot.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from deit.cli import CommandLine
from deit.data import build_dataset
from deit.errors import one_line_errors
from deit.layers import Linear, MirrorGrid, PatchEmbed
from deit.saving import atomic_path

FOLDER = Path(__file__).resolve().parent
GREY, BLUE, ORANGE = "#444444", "#0072B2", "#D55E00"
SHOE = 7  # a sneaker: its mirror image is easily told from it


def main() -> None:
    CommandLine(description=__doc__.splitlines()[0]).parse_args()
    torch.manual_seed(3)
    for name, figure in {"method": method(), "patch_embedding": patch_embedding()}.items():
        with atomic_path(FOLDER / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
        print(FOLDER / f"{name}.png")


def sneaker() -> Tensor:
    """A test image, (28, 28) from 0 to 1."""
    data = build_dataset("val")
    index = int((data.targets == SHOE).nonzero()[0][0])
    return pil_to_tensor(data.load(index))[0] / 255


def show(ax: Axes, values: Tensor, title: str, colours: str = "RdBu_r") -> None:
    """A matrix as coloured squares; signed colours are white at zero."""
    bound = values.abs().max().item()
    limits = {"vmin": 0, "vmax": 1} if colours == "gray_r" else {"vmin": -bound, "vmax": bound}
    ax.imshow(values, cmap=colours, **limits)
    ax.set_title(title, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_color("#BBBBBB")


def method() -> Figure:
    """What flopping does to features, and what that leaves of a linear layer."""
    figure = Figure(figsize=(11.5, 3.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.35), wspace=0.06)
    left.suptitle("Features: s moves with the image, a changes its sign too", fontsize=10)
    image = sneaker()
    embed = PatchEmbed(28, 4, 1, 2)
    rows = left.subplots(2, 3)
    names = ("an image", "its mirror image")
    for axes, name, pixels in zip(rows, names, (image, image.flip(-1)), strict=True):
        with torch.no_grad():
            # without the bias, which would shift the colours
            parts, biases = embed(pixels[None, None]), embed(torch.zeros(1, 1, 28, 28))
        s, a = (
            embed.grid.to_image_order(part - bias)[0, ..., 0]
            for part, bias in zip(parts, biases, strict=True)
        )
        show(axes[0], pixels, name, "gray_r")
        show(axes[1], s, "symmetric: s")
        show(axes[2], a, "antisymmetric: a")
    right.suptitle("Linear layers: in the basis (s, a) half of the matrix vanishes", fontsize=10)
    ordinary, regular, packed = right.subplots(1, 3)
    layer = Linear(16, 16, bias=False)
    rep = layer.in_rep
    matrix = torch.cat(layer(tuple(rep.split(torch.eye(16)))), -1).detach().T
    show(ordinary, torch.nn.Linear(16, 16).weight.detach(), "ordinary:\nany matrix")
    title = "equivariant, on channels and\ntheir mirror images: [A B; B A]"
    show(regular, rep.to_regular(rep.to_regular(matrix, 0), 1), title)
    show(packed, matrix, "the same on (s, a):\ntwo blocks, half the FLOPs")
    for ax, halves in ((regular, ("r", "r'")), (packed, ("s", "a"))):
        ax.axhline(7.5, color=GREY, linewidth=0.8)
        ax.axvline(7.5, color=GREY, linewidth=0.8)
        ax.set_xticks([3.5, 11.5], halves)
        ax.set_yticks([3.5, 11.5], halves)
        ax.tick_params(length=0)
    return figure


def patch_embedding() -> Figure:
    """From stored half kernels to kernels, and the order of the tokens."""
    figure = Figure(figsize=(10.6, 3.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 1), wspace=0.06)
    left.suptitle("Kernels: only the left half is stored", fontsize=10)
    # smooth numbers show the symmetry better than random ones
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, -0.1, 4), indexing="ij")
    half = torch.sin(2.5 * x + 1.5 * y) + 0.4 * y
    stored, symmetric, antisymmetric = left.subplots(1, 3, width_ratios=(1, 2, 2))
    show(stored, half, "stored\n(p x p/2)")
    show(symmetric, torch.cat([half, half.flip(1)], 1), "proj_sym: a mirror image,\ngives s")
    show(antisymmetric, torch.cat([half, -half.flip(1)], 1), "proj_asym: its negative,\ngives a")
    for ax in (symmetric, antisymmetric):
        ax.axvline(3.5, color=GREY, linestyle="--", linewidth=0.9)
    right.suptitle("Tokens: left half, middle column, right half mirrored", fontsize=10)
    for ax, grid in zip(right.subplots(1, 2), (MirrorGrid(4, 4), MirrorGrid(4, 5)), strict=True):
        draw_order(ax, grid)
    return figure


def draw_order(ax: Axes, grid: MirrorGrid) -> None:
    """The number that each patch of a grid has in the sequence."""
    number = grid.permutation().argsort().view(grid.height, grid.width)
    half = grid.width // 2
    for row in range(grid.height):
        for column in range(grid.width):
            side = BLUE if column < half else ORANGE if column >= grid.width - half else GREY
            ax.text(column, row, int(number[row, column]), color=side, ha="center", va="center")
    ax.set_xlim(-0.5, grid.width - 0.5)
    ax.set_ylim(grid.height - 0.5, -0.5)
    ax.set_xticks([i + 0.5 for i in range(grid.width - 1)], [])
    ax.set_yticks([i + 0.5 for i in range(grid.height - 1)], [])
    ax.tick_params(length=0)
    ax.grid(color="#CCCCCC")
    ax.set_aspect("equal")
    ax.set_title(f"{grid.height} x {grid.width} patches", fontsize=9)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
