from __future__ import annotations

from pathlib import Path

import pytest
from image_files import write_images


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: train/ and val/ with the classes ant, bee and cat."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def own_image_tree(tmp_path: Path) -> Path:
    """The same, for tests that damage it."""
    return write_images(tmp_path / "images")
