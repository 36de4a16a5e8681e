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
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UNSIGNED_BYTE:
        raise UserError(f"{path} is not an idx file of unsigned bytes: it starts {content[:4]!r}")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise UserError(f"{path} is damaged: it ends within its header")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(content) - header != expected:
        raise UserError(
            f"{path} is damaged: its header promises {expected} bytes of data, "
            f"it holds {len(content) - header}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
