"""The idx format of MNIST and its kin: two zero bytes, a type, the rank, the sizes, the data.

Only unsigned bytes (type 8) occur in image sets. Files may be gzip-compressed; torchvision's reader
wants them unpacked and answers a truncated file with an assertion.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from deit.errors import UserError

UNSIGNED_BYTE = 8


def read_idx(path: str | Path) -> np.ndarray:
    """The uint8 array of any shape in `path`, whose name ends with `.gz` if it is compressed.

    Raises UserError, naming the file, if it is missing, damaged or not of unsigned bytes.
    """
    path = Path(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
        if content[:3] != bytes([0, 0, UNSIGNED_BYTE]):
            raise ValueError(f"it starts {content[:4]!r}")
        shape = struct.unpack_from(f">{content[3]}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, IndexError, struct.error) as error:
        raise UserError(
            f"cannot read {path}, which must be a whole idx file of unsigned bytes: {error}"
        ) from error
