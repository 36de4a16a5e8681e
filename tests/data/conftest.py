"""Small image folders, made on the fly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
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


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: train/ and val/ with the classes ant, bee and cat."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def own_image_tree(tmp_path: Path) -> Path:
    """The same, for tests that damage it."""
    return write_images(tmp_path / "images")
