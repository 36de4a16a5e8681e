"""Which tensors the fused paths take, and the switch for all of them."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from deit import kernels
from deit.args import get_parser
from deit.errors import UserError
from deit.kernels import gpu
from deit.kernels.choice import is_plain_tensor


@pytest.fixture(autouse=True)
def restore_mode():
    before = kernels.get_mode()
    yield
    kernels.set_mode(before)


def test_plain_inside_a_block():
    kernels.set_mode("auto")
    x = torch.ones(1)
    with kernels.plain():
        assert kernels.get_mode() == "plain"
        assert not is_plain_tensor(x)
    assert is_plain_tensor(x)


def test_plain_ends_with_an_error_inside():
    kernels.set_mode("auto")
    with pytest.raises(ZeroDivisionError), kernels.plain():
        raise ZeroDivisionError
    assert kernels.get_mode() == "auto"


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="'fast': use one of auto, plain"):
        kernels.set_mode("fast")


@pytest.mark.parametrize(("value", "answer"), [("plain", "plain"), ("", "auto"), (None, "auto")])
def test_environment_variable(value, answer):
    environment = {k: v for k, v in os.environ.items() if k != kernels.ENVIRONMENT}
    if value is not None:
        environment[kernels.ENVIRONMENT] = value
    code = "from deit import kernels; print(kernels.get_mode())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == answer


def test_a_wrong_environment_variable_is_one_line():
    done = subprocess.run(
        [sys.executable, "test_equivariance.py", "--model", "d2_deit_tiny_patch16_LS"],
        env=os.environ | {kernels.ENVIRONMENT: "fast"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: the environment variable DEIT_KERNELS is 'fast': use one of auto, plain"
    ]


def test_the_first_call_of_a_compiled_network_is_its_only_compilation():
    # in a process of its own, where nothing has looked at the mode yet
    code = """
import torch
from torch._dynamo.testing import CompileCounter
from deit.layers import Linear
count = CompileCounter()
layer = torch.compile(Linear(8, 8), backend=count)
for _ in range(3):
    layer(torch.ones(2, 8))
print(count.frame_count)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_the_option_offers_the_modes():
    action = next(a for a in get_parser()._actions if a.dest == "kernels")
    assert tuple(action.choices) == kernels.MODES


def test_parameters_are_taken():
    assert is_plain_tensor(nn.Parameter(torch.ones(1)))


def test_operations_on_gpus_take_parameters_of_one_dtype_on_one_device(monkeypatch):
    monkeypatch.setattr(gpu, "kernels_take", lambda device, dtype: dtype == torch.float32)
    x, w = torch.ones(2, 4), torch.ones(2, 2)
    assert gpu.applies(x, w, nn.Parameter(w))
    assert not gpu.applies(x.double(), w.double())
    assert not gpu.applies(x[:0], w)
    assert not gpu.applies(x, w.half())
    assert not gpu.applies(x, w.as_subclass(Tagged))
    assert not gpu.applies(x, w, w.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert gpu.applies(x, w.half())
        assert not gpu.applies(x, w, w.to("meta"))


class Tagged(torch.Tensor):
    """A tensor of another kind."""


def test_subclasses_are_not_taken():
    assert not is_plain_tensor(torch.ones(1).as_subclass(Tagged))


def test_proxies_are_not_taken():
    seen = []
    torch.fx.Tracer().trace(lambda x: seen.append(is_plain_tensor(x)) or x)
    assert seen == [False]


def test_not_under_function_transforms():
    seen = []

    def look(x):
        seen.append(is_plain_tensor(x))
        return x.sum()

    torch.func.vmap(look)(torch.ones(2, 2))
    torch.func.grad(look)(torch.ones(2))
    torch.func.jvp(look, (torch.ones(2),), (torch.ones(2),))
    assert seen == [False] * 3


def test_not_while_tracing_or_exporting():
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append(is_plain_tensor(x))
            return x + (1 if is_plain_tensor(x) else 2)

    traced = torch.jit.trace(Look(), torch.ones(1), check_trace=False)
    assert seen == [False]
    assert traced(torch.ones(1)) == 3
    for strict in (False, True):
        program = torch.export.export(Look(), (torch.ones(1),), strict=strict)
        assert program.module()(torch.ones(1)) == 3
    assert torch.compile(Look(), backend="eager")(torch.ones(1)) == 2
