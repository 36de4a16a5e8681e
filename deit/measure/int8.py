"""What int8 changes: outputs, answers, accuracy, mirror symmetry; and the images that tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import sqrt
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from deit.data import (
    DeviceLoader,
    build_dataset,
    evaluation_batches,
    match_classes,
    names_of_outputs,
)
from deit.data.photos import find_photos, read_photos
from deit.deploy.info import NetworkInfo
from deit.errors import UserError

CALIBRATION_IMAGES = 512  # that the ranges of values come from; more change them little
BATCH = 32

Network = Callable[[Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor | None]]


def calibration_images(folder: str, info: NetworkInfo) -> Tensor:
    """Images of a folder, uint8 (N, 3, H, W), evenly from all of them if there are many.

    Raises:
        UserError: there are none.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--calibrate: there is no folder {folder!r}")
    paths, _ = find_photos([folder])
    paths = paths[:: -(-len(paths) // CALIBRATION_IMAGES)]
    found = [images for _, images in read_photos(paths, info.transform(), BATCH, threads=4)]
    if not found:
        raise UserError(f"--calibrate: none of the images in {folder!r} can be read")
    return torch.cat(found)


def calibration_batches(images: Tensor, info: NetworkInfo, size: int | None) -> Iterator[Tensor]:
    """The images, as a file takes them, in batches of `size`, which the first ones fill up.

    Their mirror images too: antisymmetric features then have ranges around zero, and round the same
    with either sign.
    """
    size = size or BATCH
    indices = torch.arange(-(-len(images) // size) * size) % len(images)
    for part in indices.split(size):
        batch = info.prepare(images[part])
        yield batch
        yield batch.flip(-1)


def labelled_images(folder: str, info: NetworkInfo, outputs: int) -> Batches:
    """The images in a folder a class, as a file takes them, with the labels of its outputs.

    Raises:
        UserError: there are none, or their classes are not the network's.
    """
    data = build_dataset("val", name="image_folder", root=folder, transform=info.transform())
    names, origin = names_of_outputs(
        data.class_names, outputs, source=info.model, saved=info.class_names or ()
    )
    for note in [data.note, *match_classes(data, names, outputs, origin=origin)]:
        if note:
            print(f"note    {note}")
    mean, std = (info.mean, info.std) if info.normalized else ((0.0,) * 3, (1.0,) * 3)
    batches = evaluation_batches(len(data), BATCH)
    return DeviceLoader(data, batches, device="cpu", mean=mean, std=std)


@torch.no_grad()
def measure(network: Network, quantized: Network, batches: Batches) -> str:
    """Lines on what the quantised network does otherwise on images (B, 3, H, W).

    Args:
        batches: with labels (B,), or None for all of them if there are none.

    Raises:
        UserError: an output is not finite, or the answers agree no better than guesses.
    """
    networks = {"float": network, "int8": quantized}
    answers, mirrored = [], dict.fromkeys(networks, 0.0)
    largest = distance = norm = 0.0
    console = Console(stderr=True)
    for images, labels in track(
        batches, "measuring", console=console, transient=True, disable=not console.is_terminal
    ):
        views = (images, images.flip(-1))
        (expected, _), (found, flopped) = logits = [
            [n(v) for v in views] for n in networks.values()
        ]
        if expected.ndim != 2:
            raise UserError(f"--quantize needs a classifier, which gives (B, classes) and not "
                            f"{tuple(expected.shape)}")  # fmt: skip
        if not (found.isfinite().all() and flopped.isfinite().all()):
            raise UserError("the int8 file gives outputs that are infinite or NaN: it is not left")
        for name, (own, mirror) in zip(networks, logits, strict=True):
            mirrored[name] = max(mirrored[name], (own - mirror).abs().max().item())
        given = [] if labels is None else [labels]
        answers.append(torch.stack([*(x.argmax(1) for both in logits for x in both), *given]))
        difference = (found - expected).double()
        largest = max(largest, difference.abs().max().item())
        distance, norm = distance + difference.square().sum(), norm + expected.square().sum()
    right, right_flopped, int8, int8_flopped, *labels = torch.cat(answers, dim=1)

    def percent(ours: Tensor, theirs: Tensor) -> float:
        return 100 * (ours == theirs).double().mean().item()

    same, count, classes = percent(int8, right), len(int8), expected.shape[1]
    # what guesses reach, up to two of their standard deviations
    guessed = 1 / classes + 2 * sqrt((1 - 1 / classes) / classes / count)
    if same < 100 and same <= 100 * guessed:
        raise UserError(
            f"the int8 file gives the network's answer for {same:.1f} % of {count} images, "
            f"no more than guessing among {classes} classes would: it is not left"
        )
    lines = [
        f"greatest difference from the float network {largest:.1e} "
        f"({sqrt(distance / norm):.1e} of the norm of the outputs), the same answer for "
        f"{same:.2f} % of {count} images"
    ]
    pairs = ((right, right_flopped), (int8, int8_flopped))
    for (name, greatest), pair in zip(mirrored.items(), pairs, strict=True):
        lines.append(f"mirrored, {name}: another answer for {100 - percent(*pair):.2f} % of the "
                     f"images, greatest difference {greatest:.1e}")  # fmt: skip
    for truth in labels:
        before, after = percent(right, truth), percent(int8, truth)
        lines.append(f"accuracy: float {before:.2f} %, int8 {after:.2f} %, "
                     f"a loss of {before - after:.2f} points")  # fmt: skip
    return "\n    ".join(lines)
