"""torch.export and ONNX take every family whole, for any batch size."""

from __future__ import annotations

import functools

import pytest
import torch
from networks import create, images
from torch import nn
from torch.export import Dim, ExportedProgram

BATCH = {0: Dim("batch", min=1, max=64)}


def shallow(network: str) -> nn.Module:
    """As shallow as the family can be: exporters take their time over each block."""
    depth = dict(depths=(1, 1)) if network == "hierarchical convnext" else dict(depth=1)
    return create(network, **({} if network in ("hybrid", "invariant-early") else depth))


@functools.cache
def exported(network: str) -> tuple[nn.Module, ExportedProgram]:
    """A network and what torch.export makes of it, for any batch size."""
    model = shallow(network)
    return model, torch.export.export(model, (images(),), dynamic_shapes=(BATCH,))


def test_exported_with_any_batch_size(any_network):
    model, program = exported(any_network)
    for batch in (1, 3, 6):
        x = images(batch)
        assert torch.equal(program.module()(x), model(x))


def test_strictly_exported():
    model, x = shallow("hierarchical convnext"), images(3)
    exported = torch.export.export(model, (images(),), dynamic_shapes=(BATCH,), strict=True)
    assert torch.equal(exported.module()(x), model(x))


def test_an_exported_network_survives_a_file(tmp_path):
    model, program = exported("vit")
    x = images()
    torch.export.save(program, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


@pytest.mark.parametrize("network", ["vit", "resmlp", "hierarchical convnext"])
@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 writes a fixed batch"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx(network, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, program = exported(network)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(
        program,
        f=path,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3, 6):
        x = images(batch)
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        expected = model(x).detach()
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-4)
