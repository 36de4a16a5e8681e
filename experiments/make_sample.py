"""Make deit/data/sample/ from the full Fashion-MNIST: the first images of each class of each split.

    apt-get install dataset-fashion-mnist        # or any folder with the four idx(.gz) files
    python experiments/make_sample.py --source /usr/share/datasets/fashion-mnist

The same source gives the same images in the same order, so the committed files can be checked
against it.
"""

from __future__ import annotations

import argparse
import gzip
import struct
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from deit.data.datasets import (
    DEBIAN_FASHION_MNIST,
    SAMPLE_FOLDER,
    UNSIGNED_BYTE,
    find_idx_pair,
    read_idx,
)
from deit.errors import one_line_errors

IMAGES_PER_CLASS = {"train": 500, "val": 100}


def write_idx(path: str | Path, array: np.ndarray) -> None:
    """Write a uint8 array as a gzip-compressed idx file: the same bytes for the same array."""
    if array.dtype != np.uint8:
        raise ValueError(f"idx files here hold uint8, not {array.dtype}")
    header = bytes([0, 0, UNSIGNED_BYTE, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + np.ascontiguousarray(array).tobytes()
    Path(path).write_bytes(gzip.compress(content, compresslevel=9, mtime=0))


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Sorted indices (K*count,) of the first `count` occurrences of each of the K labels."""
    chosen = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def make_sample(source: Path, target: Path) -> None:
    """Write the four files of the sample to `target` from the full set in `source`."""
    target.mkdir(parents=True, exist_ok=True)
    for split, count in IMAGES_PER_CLASS.items():
        for_split = find_idx_pair(source, split)
        images, labels = (read_idx(path) for path in for_split)
        chosen = first_of_each_class(labels, count)
        for path, array in zip(for_split, (images, labels), strict=True):
            write_idx(target / f"{path.name.removesuffix('.gz')}.gz", array[chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the bundled sample from Fashion-MNIST.")
    parser.add_argument("--source", type=Path, default=DEBIAN_FASHION_MNIST)
    parser.add_argument("--target", type=Path, default=SAMPLE_FOLDER)
    args = parser.parse_args()
    make_sample(args.source, args.target)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
