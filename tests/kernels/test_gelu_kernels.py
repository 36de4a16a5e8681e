from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deit.kernels import gelu
from deit.kernels.gelu import mirror_gelu
from deit.layers.activation import GELU, quick_gelu

ACTS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


def test_interpreted(run_kernel_tests) -> None:
    run_kernel_tests("kernels_on_gelu.py", "cpu")


@pytest.mark.gpu
def test_on_a_gpu(run_kernel_tests) -> None:
    run_kernel_tests("kernels_on_gelu.py", "cuda")


@pytest.mark.parametrize("act", ACTS)
def test_is_the_layer(act: str) -> None:
    x = torch.randn(2, 7, 20, dtype=torch.float64)
    torch.testing.assert_close(mirror_gelu(x, act), GELU(20, ACTS[act])(x))


@pytest.mark.parametrize("act", ACTS)
def test_gradients_of_both_orders(act: str) -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mirror_gelu(x, act), x)
    assert torch.autograd.gradgradcheck(lambda x: mirror_gelu(x, act), x)


def test_many_rows_are_computed_in_parts(monkeypatch) -> None:
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    expected = mirror_gelu(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    monkeypatch.setattr(gelu, "CHUNK", 13)
    y = mirror_gelu(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], gradient)


def test_half_precision_is_rounded_once() -> None:
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    torch.testing.assert_close(
        mirror_gelu(x), GELU(32)(x.double()).to(torch.bfloat16), rtol=2**-7, atol=1e-6
    )


@pytest.mark.parametrize("x", [torch.randn(3, 8, requires_grad=True), torch.randn(8, 3, 2)[:, 1:]])
def test_operation_is_well_formed(x: torch.Tensor) -> None:
    torch.library.opcheck(torch.ops.deit.mirror_gelu.default, (x, "gelu"))
    torch.library.opcheck(torch.ops.deit.mirror_gelu_backward.default, (x.detach(), x, "gelu"))


def test_rejects_what_is_no_pair() -> None:
    with pytest.raises(ValueError, match="even last axis"):
        mirror_gelu(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        mirror_gelu(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="'relu'"):
        mirror_gelu(torch.randn(2, 4), "relu")
