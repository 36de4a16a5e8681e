"""Dynamic and weight-only quantisation find all linear maps, and the results can be saved."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import create, equivariance_errors, images
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as QuantizedLinear
from torch.ao.quantization import quantize_dynamic

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def near(actual: Tensor, expected: Tensor) -> bool:
    return bool(0 < (actual - expected).norm() < 0.1 * expected.norm())


@pytest.mark.skipif(
    torch.backends.quantized.engine == "none", reason="this torch has no engine for quantised maps"
)
def test_dynamic_quantisation(linear_network):
    model, x = create(linear_network), images()
    quantized = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert count(quantized, QuantizedLinear) == count(model, nn.Linear)
    assert count(quantized, nn.Linear) == 0
    with torch.no_grad():
        y = quantized(x)
        assert near(y, model(x))
        # both halves have one weight each, and activations are rounded alike for both images
        assert max(equivariance_errors(quantized, x)) < 0.05

        other = quantize_dynamic(create(linear_network), {nn.Linear}, dtype=torch.qint8)
        other.load_state_dict(quantized.state_dict())
        torch.testing.assert_close(other(x), y)
        torch.testing.assert_close(copy.deepcopy(quantized)(x), y)
        torch.testing.assert_close(pickle.loads(pickle.dumps(quantized))(x), y)


def test_weight_only_int8_of_torchao(linear_network):
    torchao = pytest.importorskip("torchao.quantization")
    model, x = create(linear_network), images()
    before = model(x)
    keys = list(model.state_dict())
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert type(module.weight) is not nn.Parameter, name
    with torch.no_grad():
        y = model(x)
        assert near(y, before)
        assert max(equivariance_errors(model, x)) < 1e-4
        torch.testing.assert_close(copy.deepcopy(model)(x), y)
        state = model.state_dict()
        assert list(state) == keys
        other = create(linear_network)
        torchao.quantize_(other, torchao.Int8WeightOnlyConfig())
        other.load_state_dict(state, assign=True)
        torch.testing.assert_close(other(x), y)
