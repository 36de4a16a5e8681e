"""torch.export and ONNX take every family whole, for any batch size."""

from __future__ import annotations

import pytest
import torch
from networks import NETWORKS, create, images
from torch import nn
from torch.export import Dim

FAMILIES = pytest.mark.parametrize(
    "network", [name for name in NETWORKS if name != "vit, explicit attention"]
)
BATCH = {0: Dim("batch", min=1, max=64)}


def shallow(network: str) -> nn.Module:
    """As shallow as the family can be: exporters take their time over each block."""
    depth = dict(depths=(1, 1)) if network == "hierarchical convnext" else dict(depth=1)
    return create(network, **({} if network in ("hybrid", "invariant-early") else depth))


def test_exported_with_any_batch_size(any_network):
    model = shallow(any_network)
    exported = torch.export.export(model, (images(),), dynamic_shapes=(BATCH,)).module()
    for batch in (1, 3, 6):
        x = images(batch)
        assert torch.equal(exported(x), model(x))


@FAMILIES
def test_strictly_exported(network):
    model, x = shallow(network), images(3)
    exported = torch.export.export(model, (images(),), dynamic_shapes=(BATCH,), strict=True)
    assert torch.equal(exported.module()(x), model(x))


def test_an_exported_network_survives_a_file(tmp_path):
    model, x = shallow("vit"), images()
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


@FAMILIES
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx(network, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = shallow(network)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(
        model,
        (images(),),
        path,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=(BATCH,),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3, 6):
        x = images(batch)
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        expected = model(x).detach()
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-4)
