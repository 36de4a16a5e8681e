"""<class>/**/<image> below one folder or in one archive: which files count, in which order.

Hidden files and folders are no images, wherever they lie: `._x.JPEG` and `__MACOSX` (macOS),
`@eaDir` (thumbnails of Synology), `.ipynb_checkpoints`. A folder that links reach again is read
once. What is left out is counted, and said in one line.
"""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from deit.errors import UserError, some

_HIDDEN = re.compile(r"(?:^|/)(?:__MACOSX|@eaDir|\.[^/]+)(?:/|$)")


def is_hidden(path: str) -> bool:
    """Whether a part of the relative `path` (with slashes) is hidden."""
    return _HIDDEN.search(path) is not None


def is_image(path: str) -> bool:
    """Whether a file of that name is of one of the kinds that torchvision reads."""
    return path.lower().endswith(IMG_EXTENSIONS)


class Listing(NamedTuple):
    """The files below a folder, or in an archive, by their relative paths."""

    images: list[str]
    folders: set[str]
    """Those at the top, with images or without."""
    left_out: Counter[str]
    """How many files of what kind are no images."""

    def note(self, where: str | Path) -> str:
        """What is left out of `where`, in one line, or an empty string."""
        most = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        kinds = [f"{kind}: {count}" for kind, count in most]
        return f"not read in {where}: {some(kinds, 8)}" if kinds else ""


def sort_out(paths: Iterable[str]) -> Listing:
    """Tell images from other files; the paths of folders end with a slash."""
    listing = Listing([], set(), Counter())
    for path in paths:
        hidden = is_hidden(path)
        if "/" in path and not hidden:
            listing.folders.add(path.partition("/")[0])
        if path.endswith("/"):
            continue
        if is_image(path) and not hidden:
            listing.images.append(path)
        else:
            kind = PurePosixPath(path).suffix.lower() or "no suffix"
            listing.left_out["hidden files" if hidden else kind] += 1
    return listing


def list_folder(folder: Path) -> Listing:
    """All files below `folder`. Links to folders that are read already are left out.

    Folders that lie below `folder` are read before links to them: a class is read where it belongs,
    whatever leads there as well. Hidden folders are not entered. UserError for a folder that may
    not be read.
    """
    files: list[str] = []
    repeated = 0
    seen: set[tuple[int, int]] = set()
    found, links = deque([""]), deque()
    while queue := found or links:
        relative = queue.popleft()
        try:
            status = os.stat(folder / relative)
            if (status.st_dev, status.st_ino) in seen:
                repeated += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder / relative) as opened:
                entries = sorted(opened, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot read the folder {folder / relative}: {error}") from error
        for entry in entries:
            path = relative + entry.name
            is_link = entry.is_symlink()
            is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()
            if is_folder and not is_hidden(path):
                path += "/"
                (links if is_link else found).append(path)
            files.append(path)
    listing = sort_out(files)
    if repeated:
        listing.left_out["links to folders that are read already"] = repeated
    return listing


def class_tree(listing: Listing, where: str | Path) -> tuple[list[str], list[int], list[str], str]:
    """(images, their classes, the names of the classes, note) in torchvision's order.

    The note, which may be empty, says what was left out of `where`. UserError for a class without
    an image.
    """
    images = [path for path in listing.images if "/" in path]
    if loose := len(listing.images) - len(images):
        listing.left_out["images outside the class folders"] = loose
    note = listing.note(where)

    def order(path: str) -> tuple[str, str, str]:
        folder, _, name = path.rpartition("/")
        return folder.partition("/")[0], folder, name

    images.sort(key=order)
    classes = [path.partition("/")[0] for path in images]
    index = {name: number for number, name in enumerate(dict.fromkeys(classes))}
    if empty := sorted(listing.folders.difference(index)):
        raise UserError(
            f"no images in the class folders {some(empty, 5)} of {where}{note and '; '}{note}"
        )
    return images, [index[name] for name in classes], list(index), note
