"""Networks that run on the operations for GPUs, interpreted and on a GPU."""

import pytest


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_networks(device, run_kernel_tests):
    run_kernel_tests("kernels_on_networks.py", device)
