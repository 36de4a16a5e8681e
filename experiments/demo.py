"""Train an equivariant ViT on the bundled images, evaluate it, and mirror its test images.

    make demo        or        python experiments/demo.py

Hardware: two CPU cores. Expected: at most 4 minutes, at least 80 % top-1 on the 1000 test images,
and the same prediction for every test image and its mirror image. Ends with status 1 otherwise. The
last line is the path of a figure with the curves and some of the images.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

import deit
from deit.data import DeviceLoader, ImageDataset, evaluation_batches
from deit.errors import one_line_errors
from deit.train.args import parse_args
from deit.train.build import build_val_dataset
from deit.train.folder import read_log

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "runs" / "demo"
MODEL = "d2_deit_tiny_patch16_LS"
# four of its twelve blocks, and patches that suit small images: 4 x 4 tokens
NETWORK = [
    *("--model", MODEL, "--model-kwargs", "depth=4"),
    *("--input-size", "32", "--patch-size", "8"),
]
# For a short training on few images: LayerScale that lets all blocks take part from the start, and
# no augmentation. Flips would teach this network nothing anyway: it gives mirror images the same
# prediction whatever its weights.
TRAINING = [
    *("--epochs", "12", "--warmup-epochs", "1", "--batch-size", "50"),
    *("--lr", "1e-3", "--unscale-lr", "--layer-scale-init-value", "1", "--drop-path", "0"),
    *("--no-aug", "--mixup", "0", "--cutmix", "0", "--no-model-ema", "--num-workers", "1"),
]
# products this small gain nothing from a second thread, and lose much if the machine is busy
THREADS = 1
REQUIRED_ACCURACY = 80.0
SHOWN = 8


def run_main(*options: str) -> None:
    """Run deit/main.py with `options`, showing the command. Its failure ends the demo likewise."""
    command = ["python", "deit/main.py", *NETWORK, "--threads", str(THREADS), *options]
    print(f"\n$ {shlex.join(command)}", flush=True)
    result = subprocess.run([sys.executable, *command[1:]], cwd=REPOSITORY, check=False)
    if result.returncode:
        sys.exit(result.returncode)


def load_network(checkpoint: Path) -> tuple[nn.Module, ImageDataset]:
    """The trained network in evaluation mode and the test images with its transform."""
    return deit.load(checkpoint), build_val_dataset(parse_args(NETWORK))


@torch.inference_mode()
def predict(model: nn.Module, dataset: ImageDataset, change=None) -> Tensor:
    """Logits (N, K) of all images of `dataset`, each put through `change` first."""
    transform = dataset.transform
    if change is not None:
        dataset.transform = lambda image: transform(change(image))
    loader = DeviceLoader(dataset, evaluation_batches(len(dataset), 100), device="cpu")
    logits = torch.cat([model(images) for images, _ in loader])
    dataset.transform = transform
    return logits


def draw(
    history: list[dict], dataset: ImageDataset, logits: Tensor, mirrored: Tensor, title: str
) -> plt.Figure:
    """Curves above, test images and their mirror images with the predictions below."""
    figure = plt.figure(figsize=(12, 7.2), layout="constrained")
    figure.suptitle(title, fontsize=13)
    curves, images = figure.subfigures(2, 1, height_ratios=(1, 1.2))
    loss_axes, accuracy_axes = curves.subplots(1, 2)
    epochs = [record["epoch"] + 1 for record in history]
    loss_axes.plot(epochs, [record["train_loss"] for record in history], "o-", label="training")
    loss_axes.plot(epochs, [record["test_loss"] for record in history], "s-", label="test")
    loss_axes.set(xlabel="epoch", ylabel="cross-entropy", title="Loss")
    loss_axes.legend(frameon=False)
    accuracy = [record["test_acc1"] for record in history]
    accuracy_axes.plot(epochs, accuracy, "s-", color="tab:green")
    accuracy_axes.axhline(REQUIRED_ACCURACY, color="grey", linestyle=":", linewidth=1)
    accuracy_axes.annotate(
        f"{accuracy[-1]:.1f} %", (epochs[-1], accuracy[-1]), (0, 8), textcoords="offset points",
        ha="right",
    )  # fmt: skip
    accuracy_axes.set(xlabel="epoch", ylabel="top-1 in %", title="Accuracy on the test images")
    accuracy_axes.margins(y=0.15)
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    targets = torch.from_numpy(dataset.targets)
    chosen = [int((targets == label).nonzero()[0]) for label in range(SHOWN)]
    grid = images.subplots(2, SHOWN)
    for row, (change, scores) in enumerate(((None, logits), (ImageOps.mirror, mirrored))):
        for axes, index in zip(grid[row], chosen, strict=True):
            image: Image.Image = dataset.load(index)
            axes.imshow(image if change is None else change(image))
            probability, label = scores[index].softmax(0).max(0)
            right = label == targets[index]
            truth = "" if right else f" ({dataset.class_names[targets[index]]})"
            text = f"{dataset.class_names[label]}{truth}\n{100 * probability:.2f} %"
            axes.set_title(text, fontsize=9, color="tab:green" if right else "tab:red")
            axes.set(xticks=[], yticks=[])
        grid[row, 0].set_ylabel(("test image", "mirrored")[row], fontsize=11)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier training there"
    )
    args = parser.parse_args()
    folder = args.output_dir.resolve()
    # its own folder is for nothing else
    own = ["--overwrite"] if args.overwrite or folder == FOLDER else []
    start = time.perf_counter()
    run_main(*TRAINING, "--output-dir", str(folder), *own)
    checkpoint = folder / "best_checkpoint.pth"
    run_main("--eval", "--resume", str(checkpoint), "--num-workers", "0")

    torch.set_num_threads(THREADS)
    model, dataset = load_network(checkpoint)
    logits, mirrored = predict(model, dataset), predict(model, dataset, ImageOps.mirror)
    upside_down = predict(model, dataset, ImageOps.flip)
    predictions, count = logits.argmax(1), len(dataset)
    same = int((predictions == mirrored.argmax(1)).sum())
    same_upside_down = int((predictions == upside_down.argmax(1)).sum())
    difference = (logits - mirrored).abs().max().item()
    accuracy = 100 * (predictions == torch.from_numpy(dataset.targets)).float().mean().item()
    print(f"\nmirrored test images with the same prediction: {same} of {count}")
    largest = logits.abs().max().item()
    print(f"largest difference of their logits: {difference:.1e} (logits up to {largest:.1f})")
    print(f"upside down, for comparison: {same_upside_down} of {count} predictions are the same")

    title = (
        f"{MODEL} with {len(model.blocks)} blocks on {count} test images: {accuracy:.1f} % top-1; "
        f"same prediction for {same} mirror images"
    )
    figure = draw(read_log(folder), dataset, logits, mirrored, title)
    path = folder / "demo.png"
    figure.savefig(path, dpi=120)
    good = accuracy >= REQUIRED_ACCURACY and same == count
    verdict = "as expected" if good else f"expected {REQUIRED_ACCURACY} % and {count} the same"
    print(f"{accuracy:.1f} % top-1 in {time.perf_counter() - start:.0f} s: {verdict}")
    print(f"figure: {path}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
