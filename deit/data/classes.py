"""Which output of a network stands for which class of the data.

Data sets number their classes by themselves, folders in alphabetical order. A network has its own
numbers, those of the data that it was trained on: labels must be those.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import ImageNetInfo

from deit.data.images import ImageDataset
from deit.errors import UserError, some

_SYNSET = re.compile(r"n\d{8}")


def read_class_map(path: str | Path) -> list[str]:
    """The classes that a network's outputs stand for, in their order, from a file.

    Either a line for each output, with the class as the data call it (of lines that begin with
    WordNet ids only these count), or JSON: a list of names, `{name: number}`, or
    `{"number": name}`, where a list in place of a name counts by its first entry.

    Raises:
        UserError: the file cannot be read, is empty, or has a name twice or a number without one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows marks the start of a file
        if path.suffix.lower() == ".json":
            names = _from_json(json.loads(text))
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
            words = [name.split()[0] for name in names]
            names = words if all(map(_SYNSET.fullmatch, words)) else names
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(
            f"--class-map {path} cannot be read: {error}; it needs the name of a class in each "
            'line, in the order of the outputs, or JSON as {"name": number}'
        ) from error
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        raise UserError(
            f"--class-map {path} " + (f"has {twice[0]!r} twice" if twice else "is empty")
        )
    return names


def _from_json(content: Any) -> list[str]:
    if isinstance(content, list):
        pairs = list(enumerate(content))
    elif all(key.isdigit() for key in content):
        pairs = [(int(number), name) for number, name in content.items()]
    else:
        pairs = [(int(number), name) for name, number in content.items()]
    pairs.sort(key=lambda pair: pair[0])
    if [number for number, _ in pairs] != list(range(len(pairs))):
        raise ValueError(f"the numbers are not those from 0 to {len(pairs) - 1}, each once")
    return [str(name[0] if isinstance(name, list) else name) for _, name in pairs]


def names_of_outputs(
    classes: Sequence[str], outputs: int, *, source: str, saved: Sequence[str] = ()
) -> tuple[Sequence[str], str]:
    """What a network's outputs stand for, and where that is known from, for data of `classes`.

    Args:
        saved: the names that the network's checkpoint, `source`, holds.

    Raises:
        UserError: nothing says it, and the numbers of classes and outputs differ.
    """
    if saved:
        return saved, source
    imagenet = ImageNetInfo("imagenet-1k").label_names()  # WordNet ids in the order of the labels
    if outputs == len(imagenet) and set(classes) <= set(imagenet):
        return imagenet, "ImageNet-1K"
    if outputs == len(classes):
        return classes, source
    raise UserError(
        f"the data have {len(classes)} classes, the network in {source} has {outputs} outputs, and "
        "nothing says which output is which class: give --class-map FILE with the name of a class "
        "in each line, in the order of the outputs"
    )


def outputs_of(
    classes: Sequence[str], names: Sequence[str], outputs: int, *, origin: str
) -> list[int]:
    """The output of each of `classes`, for a network whose outputs stand for `names`.

    Args:
        outputs: that the network has; those beyond `names` stand for nothing.
        origin: where the names are from, for messages.

    Raises:
        UserError: there are more names than outputs, or a class is not among them.
    """
    if len(names) > outputs:
        raise UserError(
            f"{origin} names {len(names)} classes, but the network has {outputs} outputs"
        )
    place = {name: number for number, name in enumerate(names)}
    unknown = [name for name in classes if name not in place]
    if unknown:
        raise UserError(
            f"{len(unknown)} classes of the data ({some(unknown)}) are not among the {len(names)} "
            f"of {origin} ({some(names)}): --class-map FILE can say what the outputs are called "
            "in these data"
        )
    return [place[name] for name in classes]


def match_classes(
    data: ImageDataset, names: Sequence[str], outputs: int, *, origin: str
) -> list[str]:
    """Number the classes of `data` as a network does (`outputs_of`); remarks for the user."""
    present = data.num_classes
    numbers = outputs_of(data.class_names, names, outputs, origin=origin)
    data.targets = np.array(numbers, dtype=np.int64)[data.targets]
    data.class_names = tuple(names)
    if present == len(names):
        return []
    return [f"the data have {present} of the {len(names)} classes of {origin}"]
