"""Every family under half-precision autocast with tensors that hold no data.

Such tensors tell whatever mixes devices, and whatever asks for a value, which on a GPU would wait
for it. Forward they are on a GPU that need not exist. Autograd asks for the device itself, so where
there is none the backward pass has its tensors on the CPU.
"""

import pytest
import tiny
import torch
from networks import NETWORKS
from torch._subclasses import FakeTensorMode

HAS_GPU = torch.cuda.is_available()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_forward_and_backward(network, device, dtype, monkeypatch):
    if device == "cuda" and not HAS_GPU:
        if not hasattr(torch.compiler, "is_exporting"):
            pytest.skip("torch 2.6 asks for a device")
        # torch would switch autocast off, and with it what half precision brings
        monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    family, small, rates = NETWORKS[network]
    # without values: to initialise some networks would ask for them
    model = tiny.create(family, device="meta", **small, **rates).train()
    backward = device == "cpu" or HAS_GPU
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(backward):
        model.to_empty(device=device)
        with torch.autocast(device, dtype):
            logits = model(torch.empty(2, 3, 32, 32, device=device))
        assert (logits.device.type, logits.dtype) == (device, dtype)
        if backward:
            logits.float().square().sum().backward()
    if backward:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert [name for name, g in gradients.items() if g is None] == []
        assert {(g.device.type, g.dtype) for g in gradients.values()} == {(device, torch.float32)}
