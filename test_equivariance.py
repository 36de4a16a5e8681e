"""Check that layers and networks are equivariant: a command line, and a module for pytest.

    python test_equivariance.py                 # every layer, the smallest network of each family
    python test_equivariance.py --model 'd2_deit_*' --dtype float32
    python test_equivariance.py --checkpoint weights.pth    # the network in a file
    python test_equivariance.py --self-test     # break layers on purpose, and find them
    pytest test_equivariance.py                 # a quick set of the same checks

See `python test_equivariance.py --help` and `deit/verify/`.
"""

from __future__ import annotations

import sys

import torch

from deit.errors import run_command
from deit.verify.check import DTYPES, Settings, check
from deit.verify.cli import main
from deit.verify.layers import LAYER_CASES
from deit.verify.mutations import MUTATIONS, find
from deit.verify.networks import VARIANTS


def pytest_generate_tests(metafunc) -> None:
    """pytest's hook for parameters; the script itself does not need pytest."""
    cases = {"layer": LAYER_CASES, "dtype": list(DTYPES), "network": VARIANTS, "broken": MUTATIONS}
    for name in metafunc.fixturenames:
        if name in cases:
            metafunc.parametrize(name, cases[name], ids=str)


def test_layer(layer, dtype):
    assert check(layer, Settings(DTYPES[dtype])).failures == []


def test_network(network):
    assert check(network, Settings(torch.float32)).failures == []


def test_broken_layer_is_found_and_located(broken):
    *_, failures = find(broken, Settings(torch.float32))
    assert failures == []


if __name__ == "__main__":
    sys.exit(run_command(main))
