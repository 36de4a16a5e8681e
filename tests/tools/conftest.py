"""Tools of PyTorch's users, each tried on one tiny network of every equivariant family."""

from __future__ import annotations

import pytest
import torch
from networks import LINEARS, NETWORKS, ORDINARY


@pytest.fixture(params=NETWORKS)
def network(request) -> str:
    """A key of `NETWORKS`."""
    return request.param


@pytest.fixture(params=LINEARS)
def linear_network(request) -> str:
    """One of each kind of linear maps, for tools that look at `nn.Linear` alone."""
    return request.param


@pytest.fixture(params=[*NETWORKS, *ORDINARY])
def any_network(request) -> str:
    """A key of `NETWORKS` or `ORDINARY`."""
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
