"""Compilers, exporters and quantisers take networks whole, as they are and folded."""

import pytest
import torch
from tiny import EQUIVARIANT, NAMES, create_random, x32
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.fx import symbolic_trace

from deit.deploy import files, fold

# of convolutions two stages, of hybrids one block each side of the bridge: exporters take time
SMALL = {name: dict(depth=2 if name in EQUIVARIANT else 1) for name in NAMES}
SMALL["d2_convnext"] = dict(depths=(1, 1), dims=(16, 32))
EXPLICIT = dict(use_fused_attn=False, reg_tokens=1, use_symmetrized_asym_feats=True)
BATCH = {0: Dim("batch", min=1, max=64)}
# target: None for a network as it is
BOTH_FORMS = [
    *((family, None, {}) for family in NAMES),
    ("d2_deit", None, EXPLICIT),
    *((family, target, {}) for family in EQUIVARIANT for target in ("torch", "onnx")),
]


def network(family: str, target: str | None, **options) -> nn.Module:
    model = create_random(family, **SMALL[family], **options).float()
    return model if target is None else fold(model, target)


@pytest.mark.parametrize("family", EQUIVARIANT)
def test_one_graph_for_all_batch_sizes(family):
    torch._dynamo.reset()
    model = network(family, "torch")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        x = x32(batch)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("family", "target", "options"), BOTH_FORMS, ids=str)
def test_exported_with_any_batch_size_and_only_torch_operations(family, target, options):
    model = network(family, target, **options)
    program = torch.export.export(model, (x32(),), dynamic_shapes=(BATCH,))
    modules = {
        getattr(node.target, "__module__", None) or type(node.target).__module__
        for node in program.graph.nodes
        if node.op == "call_function"
    }
    assert {name.partition(".")[0] for name in modules} <= {"torch", "_operator", "math"}
    for batch in (1, 3, 6):
        x, exact = x32(batch), target is None
        tolerance = dict(rtol=0, atol=0) if exact else dict(rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(program.module()(x), model(x), **tolerance)


@pytest.mark.parametrize("family", EQUIVARIANT)
def test_symbolic_tracing(family):
    if "deit" in family and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("torch 2.6 cannot trace the expansion of a class token")
    model = network(family, "torch")
    torch.testing.assert_close(symbolic_trace(model)(x32()), model(x32()))


@pytest.mark.skipif(not files.ANY_BATCH_IN_ONNX, reason="torch 2.6 fixes the batch")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("family", "target"),
    [
        *((family, None) for family in ("d2_deit", "resmlp_equi_d2", "d2_convnext")),
        *((family, "onnx") for family in ("hybrid_deit", "resmlp_equi_d2", "d2_convnext")),
    ],
)
def test_onnx_and_its_quantiser(family, target, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = network(family, target)
    path = tmp_path / "model.onnx"
    run = files.write_onnx(model, x32(), path, {}, dynamic=True, opset=None)
    nodes = onnx.load(path).graph.node
    assert {node.domain for node in nodes} == {""}
    for batch in (1, 3):
        x = x32(batch)
        torch.testing.assert_close(run(x), model(x), rtol=1e-3, atol=1e-4)
    if target is None:  # folded networks are what is quantised
        return
    products = sum(node.op_type in ("MatMul", "Conv", "Gemm") for node in nodes)
    written = path.read_bytes()
    for batches, kinds in ((None, ("MatMulInteger", "ConvInteger")), ([x], ("DequantizeLinear",))):
        path.write_bytes(written)
        run = files.quantize_onnx(path, batches, {})
        quantised = sum(node.op_type in kinds for node in onnx.load(path).graph.node)
        assert quantised >= products / 2
        assert (run(x) - model(x)).norm() / model(x).norm() < 0.2
