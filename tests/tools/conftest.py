"""Tools of PyTorch's users, each tried on one tiny network of every equivariant family."""

import pytest
import torch
from networks import LINEARS, NETWORKS, ORDINARY

# `linear_network`: one of each kind of linear maps, for tools that look at `nn.Linear` alone
FIXTURES = {
    "network": NETWORKS,
    "linear_network": LINEARS,
    "any_network": [*NETWORKS, *ORDINARY],
}


def pytest_generate_tests(metafunc):
    for name in FIXTURES.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, FIXTURES[name])


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
