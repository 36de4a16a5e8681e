"""<class>/**/<image> below one folder or in one archive: which files count, in which order.

Hidden files and folders are no images, wherever they lie: `._x.JPEG` and `__MACOSX` (macOS),
`@eaDir` (thumbnails of Synology), `.ipynb_checkpoints`. A folder that links reach again is read
once. What is left out is counted, and said in one line.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from deit.errors import UserError, some

HIDDEN_NAMES = ("__MACOSX", "@eaDir")


class ClassTree(NamedTuple):
    """The images of some classes, in torchvision's order."""

    files: list[Any]
    """What came with the path of each image."""
    targets: list[int]
    class_names: list[str]
    note: str
    """What was left out, or an empty string."""


def is_hidden(path: str) -> bool:
    """Whether a part of the relative `path` (with slashes) is hidden."""
    return any(
        (part.startswith(".") and part != ".") or part in HIDDEN_NAMES for part in path.split("/")
    )


def is_image(path: str) -> bool:
    """Whether a file of that name is of one of the kinds that torchvision reads."""
    return path.lower().endswith(IMG_EXTENSIONS)


def list_folder(folder: Path) -> tuple[list[str], list[str], int]:
    """All files below `folder`, its class folders (both relative to it), and links not followed.

    Such a link leads to a folder that is read already. Folders that lie below `folder` are read
    before links to them, and what is hidden comes last: a class is read where it belongs, whatever
    leads there as well. UserError for a folder that may not be read.
    """
    files: list[str] = []
    classes: list[str] = []
    repeated = 0
    seen: set[tuple[int, int]] = set()
    found, links, hidden = deque([""]), deque(), deque()
    while queue := found or links or hidden:
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
            path = f"{relative}/{entry.name}" if relative else entry.name
            if not os.path.isdir(entry.path) if entry.is_symlink() else not entry.is_dir():
                files.append(path)
            elif is_hidden(path):
                # a hidden link may lead anywhere
                (files if entry.is_symlink() else hidden).append(path)
            else:
                (links if entry.is_symlink() else found).append(path)
                if not relative:
                    classes.append(path)
    return files, classes, repeated


def sort_out(
    paths: Iterable[tuple[str, Any]], classes: Iterable[str], where: str | Path, repeated: int = 0
) -> ClassTree:
    """The images among `paths` (relative to the class folders, each with anything), by class.

    `classes` are the class folders that there are at least, `repeated` the links that were not
    followed, `where` the name of it all. UserError for a class without an image.
    """
    images: list[tuple[str, Any]] = []
    hidden = loose = 0
    others: Counter[str] = Counter()
    for path, file in paths:
        if is_hidden(path):
            hidden += 1
        elif not is_image(path):
            others[PurePosixPath(path).suffix.lower() or "no suffix"] += 1
        elif "/" not in path:
            loose += 1
        else:
            images.append((path, file))
    most = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:5]
    kinds = ", ".join(f"{suffix} {count}" for suffix, count in most)
    left_out = {
        "hidden files": hidden,
        f"files of other kinds ({kinds})": others.total(),
        "images outside the class folders": loose,
        "links to folders that are read already": repeated,
    }
    note = ", ".join(f"{what}: {count}" for what, count in left_out.items() if count)
    note = f"not read in {where}: {note}" if note else ""
    images.sort(key=_torchvision_order)
    filled = {path.partition("/")[0] for path, _ in images}
    if empty := sorted(set(classes) - filled):
        shown = some(empty, 5)
        raise UserError(f"no images in the class folders {shown} of {where}{note and '; '}{note}")
    names = sorted(filled)
    index = {name: number for number, name in enumerate(names)}
    targets = [index[path.partition("/")[0]] for path, _ in images]
    return ClassTree([file for _, file in images], targets, names, note)


def _torchvision_order(image: tuple[str, Any]) -> tuple[str, str, str]:
    folder, _, name = image[0].rpartition("/")
    return folder.partition("/")[0], folder, name
