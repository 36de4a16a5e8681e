"""One cluster for all tests here: started when Slurm is installed and we are root."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# For `training_runs`, and for `cluster`, which is a script of its own too.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster import Cluster, why_unavailable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests here first: they take the longest, and mostly wait, while others run beside."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_unavailable()
    if reason:
        pytest.skip(f"no Slurm: {reason}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.up()
    yield cluster
    cluster.down()
