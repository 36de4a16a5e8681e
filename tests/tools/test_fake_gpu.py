"""Every family under half-precision autocast with tensors that hold no data.

Such tensors tell whatever mixes devices, and whatever asks for a value, which on a GPU would wait
for it. Forward they are on a GPU that need not exist. Autograd asks for the device itself, so where
there is none the backward pass has its tensors on the CPU.
"""

import pytest
import timm
import torch
from networks import NETWORKS, SIZE
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def build(family: str) -> torch.nn.Module:
    """The network without values: to initialise some would ask for them."""
    name, tiny, rates = NETWORKS[family]
    with torch.device("meta"):
        return timm.create_model(name, num_classes=5, **tiny, **rates).train()


def images(device: str) -> torch.Tensor:
    return torch.empty(2, 3, SIZE, SIZE, device=device)


@pytest.mark.skipif(
    not (hasattr(torch.compiler, "is_exporting") or torch.cuda.is_available()),
    reason="torch 2.6 asks for a device",
)
@DTYPES
@pytest.mark.parametrize("family", list(NETWORKS))
def test_forward_on_a_gpu(family, dtype, monkeypatch):
    # without a GPU torch would switch autocast off, and with it what half precision brings
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    model = build(family)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cuda")
        with torch.autocast("cuda", dtype), torch.no_grad():
            logits = model(images("cuda"))
    assert logits.device.type == "cuda"
    assert logits.dtype == dtype


@DTYPES
@pytest.mark.parametrize("family", list(NETWORKS))
def test_forward_and_backward(family, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(family)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        with torch.autocast(device, dtype):
            logits = model(images(device))
        logits.float().square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, g in gradients.items() if g is None] == []
    assert {g.device.type for g in gradients.values()} == {device}
    assert {g.dtype for g in gradients.values()} == {torch.float32}


def test_a_value_that_is_asked_for_is_told():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        images("cpu").sum().item()
