"""Compilers take every family whole: no graph breaks, no recompilation over batch
sizes, the same logits and gradients everywhere."""

from copy import deepcopy

import pytest
import timm
import torch
from tiny import NAMES, create, create_random, x32
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from deit.errors import UserError
from deit.train.compilation import compile_network

NEWER = hasattr(torch.compiler, "is_exporting")  # than torch 2.6
WHOLE = dict(use_symmetrized_asym_feats=True)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def shallow(family: str, **options) -> nn.Module:
    """All parameters random, in float32. As few blocks as the family can have: compilers take their
    time over each, and say the same of more."""
    depth = dict(depth=2 if family in ("hybrid_deit", "d2_inv_early_deit") else 1)
    if family == "d2_convnext":
        depth = dict(depths=(1, 1), dims=(16, 32))
    return create_random(family, **depth, **options).float()


def gradients(model: nn.Module, forward, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    forward(x).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", NAMES)
def test_compiled_without_graph_breaks_or_recompilation(family):
    model = shallow(family).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 5):
        x = x32(batch)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(
            gradients(model, compiled, x), gradients(model, model, x), rtol=1e-3, atol=1e-5
        )
    assert counter.frame_count == 1


# Two of three take any size: one for odd grids, one for even. torch 2.6 may need one more on the
# way to them.
@pytest.mark.parametrize(
    ("family", "options", "sizes", "graphs"),
    [
        ("d2_deit", dict(WHOLE, use_attn_mixer=True, global_pool="avg", reg_tokens=2), [32], {1}),
        ("d2_deit", dict(img_size=40, global_pool=""), [40], {1}),
        ("d2_deit", dict(dynamic_img_size=True), [32, 40, (24, 56), (48, 64), (56, 48)],
         {3} if NEWER else {3, 4}),
        ("resmlp_equi_d2", WHOLE, [32], {1}),
        ("d2_convnext", WHOLE, [32], {1}),
    ],
)  # fmt: skip
def test_compiled_options(family, options, sizes, graphs):
    model = shallow(family, **options)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in sizes:
        x = x32(2, size if isinstance(size, tuple) else (size, size))
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count in graphs


def test_compiled_training_step_with_stochastic_depth():
    torch.manual_seed(0)
    model = create("d2_convnext_isotropic", drop_path_rate=0.5, depth=2).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x, y = x32(8), torch.arange(8)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(compiled(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert counter.frame_count == 1
    assert losses[-1] < losses[0]
    # masks are drawn anew in each step
    with torch.no_grad():
        assert len({compiled(x).numpy().tobytes() for _ in range(4)}) > 1


# the first block's rate is zero, and so a ConvNeXt's has no stochastic depth
@pytest.mark.parametrize(
    ("family", "training", "graphs"),
    [
        ("d2_deit", False, 1),
        ("d2_deit", True, 1),
        ("deit", True, 1),
        ("resmlp_equi_d2", True, 1),
        ("d2_convnext_isotropic", True, 2),
    ],
)
def test_one_graph_serves_all_blocks(family, training, graphs, monkeypatch):
    model = create(family, depth=4, drop_path_rate=0.3).train(training)
    eager = deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda m: compile_module(m, backend=counter))
    compile_network(model, blocks=True)
    x = x32(3)
    model(x).square().mean().backward()
    assert counter.frame_count == graphs
    if not training:
        torch.testing.assert_close(
            gradients(model, model, x), gradients(eager, eager, x), rtol=1e-3, atol=1e-5
        )
    assert model.state_dict().keys() == eager.state_dict().keys()


def test_networks_without_known_blocks_are_not_compiled_by_block():
    with pytest.raises(UserError, match=r"RegNet has neither .* --compile-blocks"):
        compile_network(timm.create_model("regnety_002"), blocks=True)


@pytest.mark.slow
def test_compiled_by_inductor_with_gradient_checkpointing():
    model, x = shallow("d2_deit").train(), x32()
    expected = gradients(model, model, x)
    model.set_grad_checkpointing()
    compiled = torch.compile(model, fullgraph=True, mode="default")
    torch.testing.assert_close(gradients(model, compiled, x), expected, rtol=1e-3, atol=1e-4)
