"""Labelled images from files, from a zip archive read in place, and from one array.

All three keep their index in numpy arrays: a list of a million Python strings would be copied page
by page into every forked worker, because reading a string touches its reference count.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
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
        return _deep_to_grey(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode != "RGB" else image
    if image.mode == "La":  # converts to nothing else
        image = image.convert("LA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _deep_to_grey(image: Image.Image) -> Image.Image:
    """An image of the mode I;16 (of any byte order), I or F as one of the mode L."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are infinite or not a number")
    # some versions of Pillow hold the 16 bits of PNG and PGM in the mode I
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        low, span = 0.0, 65535.0
    else:
        low, span = values.min(), np.ptp(values) or 1.0
    return Image.fromarray(np.rint((values - low) * (255 / span)).astype(np.uint8))


def decode_rgb(file: str | BinaryIO, source: str) -> Image.Image:
    """The RGB image in `file`; `source` names it in the UserError that a damaged one raises."""
    try:
        with Image.open(file) as image:
            image.load()
            return to_rgb(image)
    except Exception as error:  # the decoders raise whatever their library does
        reason = str(error) or type(error).__name__
        raise UserError(f"cannot read the image {source}: {reason}") from error


class ImageDataset(Dataset):
    """Images and their classes: `dataset[i]` is `(transform(RGB image), class index)`.

    Subclasses say how to `load` image i and how to name its `source` in a message. `note` tells
    the user what was left out when the images were listed; it is empty if nothing was.
    """

    def __init__(
        self,
        targets: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        transform: Callable[[Image.Image], Any] | None = None,
        note: str = "",
    ) -> None:
        self.targets = np.asarray(targets, dtype=np.int64)
        self.class_names = tuple(class_names)
        self.transform = transform
        self.note = note

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def renumber(self, names: Sequence[str], numbers: Sequence[int]) -> None:
        """Give each class its new number, its place in `names`."""
        self.targets = np.asarray(numbers, dtype=np.int64)[self.targets]
        self.class_names = tuple(names)

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

    def load(self, index: int) -> Image.Image:
        raise NotImplementedError

    def source(self, index: int) -> str:
        raise NotImplementedError


class FileImages(ImageDataset):
    """One file an image; `names` are relative to `root`."""

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        targets: Sequence[int],
        class_names: Sequence[str],
        note: str = "",
    ) -> None:
        super().__init__(targets, class_names, note=note)
        self.root = str(root)
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)

    def source(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._names[index]))

    def load(self, index: int) -> Image.Image:
        path = self.source(index)
        return decode_rgb(path, path)


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
        super().__init__(targets, class_names, note=note)
        self.archive = str(archive)
        for member in members:
            if member.flag_bits & 1:
                raise UserError(f"{archive}: {member.filename} is encrypted")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(
                    f"{archive}: {member.filename} is neither stored nor deflated; pack it again"
                )
        self._names = np.array([os.fsencode(m.filename) for m in members], dtype=np.bytes_)
        self._index = np.array(
            [(m.header_offset, m.compress_size, m.compress_type, m.CRC) for m in members],
            dtype=np.int64,
        )
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)

    def source(self, index: int) -> str:
        return f"{self.archive}/{os.fsdecode(self._names[index])}"

    def load(self, index: int) -> Image.Image:
        source = self.source(index)
        return decode_rgb(io.BytesIO(self._read(index, source)), source)

    def _read(self, index: int, source: str) -> bytes:
        """The uncompressed bytes of member `index`, checked against its CRC."""
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.archive, os.O_RDONLY)
            offset, size, kind, checksum = self._index[index].tolist()
            header = os.pread(self._descriptor, LOCAL_HEADER.size, offset)
            signature, name_length, extra_length = LOCAL_HEADER.unpack(header)
            start = offset + LOCAL_HEADER.size + name_length + extra_length
            content = os.pread(self._descriptor, size, start)
            if kind == zipfile.ZIP_DEFLATED:
                content = zlib.decompress(content, wbits=-zlib.MAX_WBITS)
        except (OSError, struct.error, zlib.error) as error:
            raise UserError(f"cannot read {source}: {error}") from error
        if signature != b"PK\x03\x04" or zlib.crc32(content) != checksum:
            raise UserError(f"cannot read {source}: the archive is damaged there (wrong checksum)")
        return content


class ArrayImages(ImageDataset):
    """Images in one uint8 array, (N, H, W) grey or (N, H, W, 3) RGB; grey ones come out as RGB."""

    def __init__(
        self,
        images: np.ndarray,
        targets: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        name: str,
        transform: Callable | None = None,
    ) -> None:
        super().__init__(targets, class_names, transform)
        self._images = images
        self._name = name

    def source(self, index: int) -> str:
        return f"{self._name}, image {index}"

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index]).convert("RGB")
