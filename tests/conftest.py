"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import make_images


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: the images of `make_images` in train/ and val/."""
    return make_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def no_cluster_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine's own cluster file must not decide what a test sees."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DEIT_CLUSTER", raising=False)
