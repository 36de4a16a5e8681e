"""Small image folders and archives, made on the fly."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")
IMAGES_PER_CLASS = {"train": 5, "val": 4}


def write_images(root: Path, classes=CLASSES, size=(40, 36)) -> Path:
    """An ImageNet-like tree: JPEGs and PNGs, grey and RGB, one class with a nested folder."""
    generator = np.random.default_rng(0)
    for split, count in IMAGES_PER_CLASS.items():
        for name in classes:
            for number in range(count):
                folder = root / split / name / ("deeper" if number == 2 else "")
                folder.mkdir(parents=True, exist_ok=True)
                shape = (*size, 3) if number % 2 else size
                image = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
                image.save(folder / f"{name}_{number}.{('JPEG', 'png')[number == 3]}")
    return root


def contents(dataset) -> list[tuple[bytes, int]]:
    return [(dataset[i][0].tobytes(), dataset[i][1]) for i in range(len(dataset))]


def pack(tree: Path, archive: Path, prefix: str = "", method: int = zipfile.ZIP_STORED) -> None:
    """All files below `tree` as `prefix`..., in reverse order, with folders and rubbish."""
    with zipfile.ZipFile(archive, "w", method) as opened:
        for path in sorted(tree.rglob("*"), reverse=True):
            name = f"{prefix}{path.relative_to(tree)}"
            opened.write(path, name)
        opened.writestr("__MACOSX/ant/._ant_0.JPEG", b"rubbish")
        opened.writestr(f"{prefix}README.txt", b"rubbish")
