"""Labelled images from files, from a zip archive read in place, and from one array.

Their index is in numpy arrays: a list of a million Python strings would be copied page by page into
every forked worker, because reading a string touches its reference count.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from deit.errors import UserError

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, of the extra field


def to_rgb(image: Image.Image) -> Image.Image:
    """`image`, of any of Pillow's modes, as an 8-bit RGB image of the same size.

    Pillow's own conversion clips deep grey at 255 and shows the colours that hide under transparent
    pixels. Here 16-bit grey is scaled from 0...65535 (an RGB image of 16 bits Pillow scales like
    that while reading). Other 32-bit integers and floats have no range by themselves: they are
    scaled from the smallest to the largest value of the image. What is transparent shows white.
    EXIF orientation is not applied.

    Raises ValueError for values that are not finite.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it has values that are infinite or not a number")
        # some versions of Pillow hold the 16 bits of PNG and PGM in the mode I
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            low, span = 0.0, 65535.0
        else:
            low, span = values.min(), np.ptp(values) or 1.0
        grey = np.rint((values - low) * (255 / span)).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode != "RGB" else image
    if image.mode == "La":  # converts to nothing else
        image = image.convert("LA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def read_rgb(file: str | Path | BinaryIO, *, turned: bool = False) -> Image.Image:
    """The image in `file` as RGB, `turned` as its EXIF orientation says. Raises as Pillow does."""
    with Image.open(file) as image:
        image.load()
        if turned:
            with contextlib.suppress(Exception):  # damaged metadata do not spoil the pixels
                ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


class ImageDataset(Dataset):
    """Images in files and their classes: `dataset[i]` is `(transform(RGB image), class index)`.

    `names` are relative to `root`. `note` tells the user what was left out when the images were
    listed; it is empty if nothing was.
    """

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        targets: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        note: str = "",
    ) -> None:
        self.root = str(root)
        self.targets = np.asarray(targets, dtype=np.int64)
        self.class_names = tuple(class_names)
        self.note = note
        self.transform: Callable[[Image.Image], Any] | None = None
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.load(index)
        if self.transform is not None:
            try:
                image = self.transform(image)
            except Exception as error:
                if hasattr(error, "add_note"):  # from Python 3.11 on
                    error.add_note(f"while transforming the image {self.source(index)}")
                raise
        return image, int(self.targets[index])

    def source(self, index: int) -> str:
        """What image `index` is called in a message."""
        return os.path.join(self.root, os.fsdecode(self._names[index]))

    def load(self, index: int) -> Image.Image:
        """Image `index` as RGB. UserError, naming it, if it cannot be read."""
        source = self.source(index)
        try:
            return self._read(index)
        except Exception as error:  # the decoders raise whatever their library does
            reason = str(error) or type(error).__name__
            raise UserError(f"cannot read the image {source}: {reason}") from error

    def _read(self, index: int) -> Image.Image:
        return read_rgb(self.source(index))


class ZipImages(ImageDataset):
    """Members of one zip archive, read in place.

    The central directory is parsed once; a worker then needs only a file descriptor, which it opens
    at its first image. `os.pread` has no file position, so that even a descriptor inherited by a
    fork can be shared.
    """

    def __init__(
        self,
        archive: str | Path,
        members: Sequence[zipfile.ZipInfo],
        targets: Sequence[int],
        class_names: Sequence[str],
        note: str = "",
    ) -> None:
        super().__init__(archive, [m.filename for m in members], targets, class_names, note)
        for member in members:
            known = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if member.flag_bits & 1 or not known:
                raise UserError(
                    f"{archive}: {member.filename} is encrypted, or neither stored nor deflated; "
                    "pack it again"
                )
        index = [(m.header_offset, m.compress_size, m.compress_type, m.CRC) for m in members]
        self._index = np.array(index, dtype=np.int64)
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)

    def _read(self, index: int) -> Image.Image:
        if self._descriptor is None:
            self._descriptor = os.open(self.root, os.O_RDONLY)
        offset, size, kind, checksum = self._index[index].tolist()
        header = os.pread(self._descriptor, LOCAL_HEADER.size, offset)
        signature, name_length, extra_length = LOCAL_HEADER.unpack(header)
        start = offset + LOCAL_HEADER.size + name_length + extra_length
        content = os.pread(self._descriptor, size, start)
        if kind == zipfile.ZIP_DEFLATED:
            content = zlib.decompress(content, wbits=-zlib.MAX_WBITS)
        if signature != b"PK\x03\x04" or zlib.crc32(content) != checksum:
            raise ValueError("the archive is damaged there (wrong checksum)")
        return read_rgb(io.BytesIO(content))


class ArrayImages(ImageDataset):
    """Images in one uint8 array, (N, H, W) grey or (N, H, W, 3) RGB; grey ones come out as RGB."""

    def __init__(
        self,
        images: np.ndarray,
        targets: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        name: str,
    ) -> None:
        super().__init__(name, (), targets, class_names)
        self._images = images

    def source(self, index: int) -> str:
        return f"{self.root}, image {index}"

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index]).convert("RGB")
