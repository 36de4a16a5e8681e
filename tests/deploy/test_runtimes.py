"""Compilers, exporters and quantisers take folded networks whole."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.fx import symbolic_trace

from deit.deploy import files, fold

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny import NAMES, create_random, images

FOLDED = [name for name in NAMES if "d2" in name or "hybrid" in name]
# of convolutions two stages, of the others two blocks, and one each side of a bridge
SMALL = {name: dict(depth=2) for name in FOLDED}
SMALL["d2_convnext"] = dict(depths=(1, 1), dims=(16, 32))
BATCH = {0: Dim("batch", min=1, max=64)}


def folded(family: str, target: str = "torch") -> nn.Module:
    return fold(create_random(family, **SMALL[family]).float(), target)


def x32(count: int = 2) -> torch.Tensor:
    return images(count, dtype=torch.float32)


@pytest.mark.parametrize("family", FOLDED)
def test_one_graph_for_all_batch_sizes(family):
    torch._dynamo.reset()
    model = folded(family)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        x = x32(batch)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("target", ["torch", "onnx"])
@pytest.mark.parametrize("family", FOLDED)
def test_exported_with_any_batch_size_and_only_torch_operations(family, target):
    model = folded(family, target)
    program = torch.export.export(model, (x32(),), dynamic_shapes=(BATCH,))
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert type(node.target).__module__.startswith("torch") or node.target.__module__ in (
                "_operator",
                "math",
            )
            assert "deit" not in str(node.target)
    for batch in (1, 3):
        x = x32(batch)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FOLDED)
def test_symbolic_tracing(family):
    if "deit" in family and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("torch 2.6 cannot trace the expansion of a class token")
    model = folded(family)
    torch.testing.assert_close(symbolic_trace(model)(x32()), model(x32()))


@pytest.mark.skipif(not files.ANY_BATCH_IN_ONNX, reason="torch 2.6 fixes the batch")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", ["hybrid_deit", "resmlp_equi_d2", "d2_convnext"])
def test_onnx_and_its_quantiser(family, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = folded(family, "onnx")
    path = tmp_path / "model.onnx"
    run = files.write_onnx(model, x32(), path, {}, dynamic=True, opset=None)
    nodes = onnx.load(path).graph.node
    assert {node.domain for node in nodes} == {""}
    for batch in (1, 3):
        x = x32(batch)
        torch.testing.assert_close(run(x), model(x), rtol=1e-3, atol=1e-4)
    products = sum(node.op_type in ("MatMul", "Conv", "Gemm") for node in nodes)
    written = path.read_bytes()
    for batches, kinds in ((None, ("MatMulInteger", "ConvInteger")), ([x], ("DequantizeLinear",))):
        path.write_bytes(written)
        run = files.quantize_onnx(path, batches, {})
        quantised = sum(node.op_type in kinds for node in onnx.load(path).graph.node)
        assert quantised >= products / 2
        assert (run(x) - model(x)).norm() / model(x).norm() < 0.2
