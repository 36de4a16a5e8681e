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

from deit.errors import one_line_errors
from deit.verify.check import check
from deit.verify.cli import main
from deit.verify.layers import LAYER_CASES
from deit.verify.mutations import MUTATIONS, apply_mutation
from deit.verify.networks import DEFAULT
from deit.verify.settings import DTYPES, Settings


def pytest_generate_tests(metafunc) -> None:
    """pytest's hook for parameters; the script itself does not need pytest."""
    cases = {
        "layer": LAYER_CASES,
        "dtype": list(DTYPES),
        "network": [case for case in DEFAULT if max(case.img_size) < 224],
        "broken": MUTATIONS,
    }
    for name in metafunc.fixturenames:
        if name in cases:
            metafunc.parametrize(name, cases[name], ids=str)


def test_layer(layer, dtype):
    assert check(layer, Settings(DTYPES[dtype])).failures == []


def test_network(network):
    assert check(network, Settings(torch.float32)).failures == []


def test_broken_layer_is_found_and_located(broken):
    assert apply_mutation(broken, Settings(torch.float32)).failures == []


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
