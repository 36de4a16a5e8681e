"""One cluster a process of tests: started when Slurm is installed and we are root."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# For `training_runs`, `jobs`, and `cluster`, which is a script of its own too.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster import Cluster, why_unavailable
from jobs import BATCH, CLUSTER, MID_EPOCH, PROCESSES, TRAINING, UPDATES, WAITING, Job, launch
from training_runs import make_images


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


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Images of noise, as many as make `UPDATES` updates an epoch."""
    return make_images(tmp_path_factory.mktemp("data"), UPDATES * PROCESSES * BATCH, 8)


@pytest.fixture(scope="session")
def submit(cluster: Cluster, data: Path, tmp_path_factory) -> Callable[..., Job]:
    """`submit(*options)`: through the script, as a user does, from another folder.

    With `wait=True` the training waits, the first time, for what the test does to it: in the second
    epoch, so that a checkpoint of the first exists.
    """

    def run(*options: str, wait: bool = False) -> Job:
        words = [*CLUSTER, *TRAINING, "--data-path", str(data), *options]
        env = {"PYTHONPATH": str(WAITING), "WAIT_AT": MID_EPOCH} if wait else {}
        done = launch(cluster, tmp_path_factory.mktemp("runs"), *words, **env)
        assert done.returncode == 0, done.stderr
        job_id = re.search(r"^job (\S+)", done.stdout, re.M)[1]
        folder = re.search(r"^  folder  (.+)", done.stdout, re.M)[1]
        job = Job(cluster, job_id, Path(folder), done.stdout)
        if wait:
            job.wait_until(lambda: MID_EPOCH in job.log, "second epoch")
        return job

    return run


@pytest.fixture(scope="session")
def undisturbed(submit: Callable[..., Job]) -> Job:
    job = submit()
    job.wait_for_end()
    return job
