"""Whole networks on the operations for GPUs; run by test_network_kernels.py in its own process."""

import os

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import deit.models  # noqa: F401 - registers the networks
from deit import kernels
from deit.equivariance import randomize_
from deit.kernels import tuning
from deit.layers.attention import Attention

DEVICE = os.environ["DEIT_KERNEL_TESTS"]
torch.backends.cudnn.allow_tf32 = False  # the patch embedding would round to ten bits
VIT = {"embed_dim": 24, "num_heads": 3, "depth": 2}
FORWARD = {"mirror_layer_norm", "mirror_linear", "mirror_linear_act"}
CASES = [
    ("d2_deit_tiny_patch16_LS", VIT, FORWARD),
    ("d2_inv_early_deit_tiny_patch16_LS", VIT, FORWARD),
    ("resmlp_equi_d2_12", {"embed_dim": 16, "depth": 1}, {"mirror_linear"}),
    ("d2_convnext_isotropic_small", {"embed_dim": 16, "depth": 1}, FORWARD | {"mirror_depthwise"}),
]


@pytest.fixture(autouse=True)
def forget_decisions(monkeypatch):
    monkeypatch.setattr(tuning._TUNER, "_chosen", {})
    monkeypatch.setattr(tuning._TUNER, "_decisions", {})


def make(name, options):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5, img_size=32, **options)
    return randomize_(network).to(DEVICE), torch.randn(2, 3, 32, 32, device=DEVICE)


def outcome(network: nn.Module, x: torch.Tensor, run=None) -> torch.Tensor:
    """Logits and all gradients."""
    network.zero_grad()
    logits = (network if run is None else run)(x)
    logits.square().sum().backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return torch.cat([logits.detach().flatten(), *gradients])


def relative(actual, expected):
    return float((actual.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "options", "ops"), CASES, ids=[case[0] for case in CASES])
def test_training_and_inference(name, options, ops):
    network, x = make(name, options)
    actual = outcome(network, x)
    torch.compiler.reset()
    compiled = outcome(network, x, torch.compile(network, backend="aot_eager", fullgraph=True))
    used = {decision.op for decision in tuning.report()}
    with torch.no_grad():
        logits = network.eval()(x)
        flopped = network(x.flip(-1))
    with kernels.plain():
        expected = outcome(network.train().double(), x.double())
        plain = network.eval()(x.double())
    assert used >= ops
    assert relative(actual, expected) < 1e-5
    assert relative(compiled, expected) < 1e-5
    assert relative(logits, plain) < 1e-5
    assert relative(flopped, plain) < 1e-5


@pytest.mark.parametrize(("name", "options", "ops"), CASES, ids=[case[0] for case in CASES])
def test_autocast(name, options, ops):
    network, x = make(name, options)
    # the interpreter multiplies float16 matrices, and no bfloat16 ones
    with torch.autocast(DEVICE, torch.float16):
        actual = outcome(network, x)
        assert network(x).dtype == torch.float16
    with kernels.plain():
        expected = outcome(network.double(), x.double())
    assert relative(actual, expected) < 2e-2


class Calls(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_gradients_of_queries_keys_and_values_are_copied_once():
    layer = Attention(32, 2).to(DEVICE)
    x = torch.randn(2, 5, 32, device=DEVICE, requires_grad=True)
    for _ in range(2):  # the second time with what was chosen
        y = layer(x).sum()
        with Calls() as calls:
            y.backward()
    assert "mirror_linear" in calls.names
    assert calls.names.count("stack") + calls.names.count("cat") == 1
    assert not {"select_backward", "zeros", "add"} & set(calls.names)
    # of the expanded gradient of the sum, and of leaves that autograd keeps
    assert calls.names.count("clone") <= 1


def test_what_is_left_to_the_plain_formulas():
    network, x = make("d2_deit_tiny_patch16_LS", VIT)
    with kernels.plain(), torch.no_grad():
        network(x)
    with torch.no_grad():
        network.double()(x.double())
    assert tuning.report() == []
