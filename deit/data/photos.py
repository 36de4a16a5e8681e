"""Photographs without labels: which files they are, and their pixels in batches."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from deit.data.images import to_rgb
from deit.data.transforms import Transform
from deit.data.tree import is_hidden, is_image, list_folder
from deit.errors import UserError, one_line

__all__ = ["PhotoBatch", "find_photos", "read_photo", "read_photos"]

_KINDS_SHOWN = 5


class PhotoBatch(NamedTuple):
    """What was read of some files, and why the others could not be."""

    paths: list[str]
    images: Tensor | None
    """uint8 (B, 3, H, W), one for each path; None if there is none."""
    failures: list[tuple[str, str]]
    """(path, reason)"""


def find_photos(sources: Sequence[str]) -> tuple[list[str], str]:
    """The files among `sources` and the images below their folders, each once, in order.

    Of folders, hidden files and files of other kinds are left out. The text says how many they are;
    it is empty if there are none.

    Raises:
        UserError: one of them does not exist, a folder cannot be read, or there are no images.
    """
    found: dict[str, None] = {}  # of names alone, for folders of a million
    left_out: Counter[str] = Counter()
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            for file in sorted(list_folder(path)[0]):
                if is_hidden(file):
                    left_out["hidden"] += 1
                elif is_image(file):
                    found[str(path / file)] = None
                else:
                    left_out[PurePath(file).suffix.lower() or "no suffix"] += 1
        elif path.exists():
            found[str(path)] = None
        else:
            raise UserError(f"there is no file or folder {source!r}")
    kinds = [f"{kind} {count}" for kind, count in left_out.most_common(_KINDS_SHOWN)]
    kinds += ["..."] if len(left_out) > _KINDS_SHOWN else []
    note = ""
    if left_out:
        note = f"{left_out.total()} files are left out ({', '.join(kinds)})"
    if not found:
        where = ", ".join(map(repr, sources))
        raise UserError(f"there are no images in {where}{note and '; '}{note}")
    return list(found), note


def read_photo(path: str | Path) -> Image.Image:
    """The photograph as RGB, turned as its EXIF orientation says. Raises whatever Pillow does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large images and odd metadata
        with Image.open(path) as image:
            image.load()
            turned = image
            with contextlib.suppress(Exception):  # damaged metadata do not spoil the pixels
                turned = ImageOps.exif_transpose(image)
                turned.format = image.format  # says what the mode I means
            return to_rgb(turned)


def read_photos(
    paths: Sequence[str], transform: Transform, batch_size: int, threads: int
) -> Iterator[PhotoBatch]:
    """The photographs in batches, each short by the files that could not be read.

    Threads read the next batch while the present one is in use.
    """

    def read(path: str) -> Tensor | str:
        try:
            return transform(read_photo(path))
        except Exception as error:  # the decoders raise whatever their library does
            return one_line(error)[:200]

    pool = ThreadPoolExecutor(threads)
    try:
        coming = [pool.submit(read, path) for path in paths[:batch_size]]
        for start in range(0, len(paths), batch_size):
            found = [future.result() for future in coming]
            end = start + batch_size
            coming = [pool.submit(read, path) for path in paths[end : end + batch_size]]
            results = list(zip(paths[start:end], found, strict=True))
            images = [result for result in found if not isinstance(result, str)]
            yield PhotoBatch(
                [path for path, result in results if not isinstance(result, str)],
                torch.stack(images) if images else None,
                [(path, result) for path, result in results if isinstance(result, str)],
            )
    finally:
        pool.shutdown(cancel_futures=True)
