"""Photographs without labels: which files they are, and their pixels in batches."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from deit.data.images import to_rgb
from deit.data.transforms import Transform
from deit.data.tree import is_hidden, is_image, list_folder
from deit.errors import UserError, one_line

__all__ = ["Photos", "find_photos", "read_photo"]


def find_photos(sources: Sequence[str]) -> list[Path]:
    """The files among `sources` and the images below their folders, each once, in order.

    Of folders, hidden files and files of other kinds are left out.

    Raises:
        UserError: one of them does not exist, a folder cannot be read, or there are no images.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            files = sorted(list_folder(path)[0])
            found += [path / file for file in files if is_image(file) and not is_hidden(file)]
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"there is no file or folder {source!r}")
    if not found:
        raise UserError(f"there are no images in {', '.join(map(repr, sources))}")
    return list(dict.fromkeys(found))


def read_photo(path: Path) -> Image.Image:
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


class Photos:
    """Iterates over (paths, uint8 images (B, 3, H, W)); `failures` has what could not be read.

    Threads read the next batch while the present one is in use. A batch may be short by the files
    that could not be read, and empty (None) if none could.
    """

    def __init__(
        self, paths: Sequence[Path], transform: Transform, batch_size: int, threads: int
    ) -> None:
        self._paths, self._transform = paths, transform
        self._batch_size, self._threads = batch_size, threads
        self.failures: list[tuple[Path, str]] = []

    def __iter__(self) -> Iterator[tuple[list[Path], Tensor | None]]:
        starts = range(0, len(self._paths), self._batch_size)
        batches = [self._paths[start : start + self._batch_size] for start in starts]
        with ThreadPoolExecutor(self._threads) as pool:
            coming = [pool.submit(self._read, path) for path in batches[0]]
            for number, paths in enumerate(batches):
                ready = [future.result() for future in coming]
                following = batches[number + 1] if number + 1 < len(batches) else ()
                coming = [pool.submit(self._read, path) for path in following]
                good = [(p, i) for p, i in zip(paths, ready, strict=True) if not isinstance(i, str)]
                self.failures += [
                    (p, i) for p, i in zip(paths, ready, strict=True) if isinstance(i, str)
                ]
                images = torch.stack([image for _, image in good]) if good else None
                yield [path for path, _ in good], images

    def _read(self, path: Path) -> Tensor | str:
        try:
            return self._transform(read_photo(path))
        except Exception as error:  # the decoders raise whatever their library does
            return one_line(error)[:200]
