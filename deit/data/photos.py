"""Photographs without labels: which files they are, and their pixels in batches."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from deit.data.images import read_rgb
from deit.data.transforms import Transform
from deit.data.tree import list_folder
from deit.errors import UserError, one_line


def find_photos(sources: Sequence[str]) -> tuple[list[str], str]:
    """The files among `sources` and the images below their folders, each once, in order.

    Of folders, hidden files and files of other kinds are left out. The text says how many they are;
    it is empty if there are none.

    Raises:
        UserError: one of them does not exist, a folder cannot be read, or there are no images.
    """
    found: dict[str, None] = {}  # of names alone, for folders of a million
    notes = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            listing = list_folder(path)
            found.update(dict.fromkeys(str(path / file) for file in sorted(listing.images)))
            notes += filter(None, [listing.note(path)])
        elif path.exists():
            found[str(path)] = None
        else:
            raise UserError(f"there is no file or folder {source!r}")
    note = "; ".join(notes)
    if not found:
        where = ", ".join(map(repr, sources))
        raise UserError(f"there are no images in {where}{note and '; '}{note}")
    return list(found), note


def read_photos(
    paths: Sequence[str], transform: Transform, batch_size: int, threads: int
) -> Iterator[tuple[list[str], Tensor]]:
    """The photographs, turned as their EXIF orientation says, in batches uint8 (B, 3, H, W).

    Each comes with its B paths. Files that cannot be read are named on stderr, and skipped. Threads
    read the next batch while the present one is in use.
    """

    def read(path: str) -> Tensor | str:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about large images and odd metadata
                return transform(read_rgb(path, turned=True))
        except Exception as error:  # the decoders raise whatever their library does
            return one_line(error)[:200]

    pool = ThreadPoolExecutor(threads)
    try:
        coming = pool.map(read, paths[:batch_size])
        for start in range(0, len(paths), batch_size):
            end = start + batch_size
            results = dict(zip(paths[start:end], coming, strict=True))
            coming = pool.map(read, paths[end : end + batch_size])
            for path, result in results.items():
                if isinstance(result, str):
                    print(f"skipped {path}: {result}", file=sys.stderr)
            images = {p: result for p, result in results.items() if not isinstance(result, str)}
            if images:
                yield list(images), torch.stack(list(images.values()))
    finally:
        pool.shutdown(cancel_futures=True)
