"""Compilers take every family whole: no graph breaks, no recompilation over batch
sizes, the same logits and gradients everywhere."""

from copy import deepcopy

import pytest
import timm
import torch
from tiny import NAMES, create, create_random, images
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from deit.errors import UserError
from deit.train.compilation import compile_network


def x32(count: int = 2) -> Tensor:
    return images(count, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(family: str, **kwargs) -> nn.Module:
    """All parameters random, in float32. As few blocks as the family can have: compilers take their
    time over each, and say the same of more."""
    depth = dict(depth=2 if family in ("hybrid_deit", "d2_inv_early_deit") else 1)
    if family == "d2_convnext":
        depth = dict(depths=(1, 1), dims=(16, 32))
    return create_random(family, **{**depth, **kwargs}).float()


def gradients(model: nn.Module, forward, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    forward(x).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", NAMES)
def test_compiled_without_graph_breaks_or_recompilation(family):
    model = trained(family).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 5):
        x = x32(batch)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(
            gradients(model, compiled, x), gradients(model, model, x), rtol=1e-3, atol=1e-5
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("d2_deit", dict(use_attn_mixer=True, use_symmetrized_asym_feats=True, global_pool="avg",
                         reg_tokens=2)),
        ("d2_deit", dict(img_size=40, global_pool="")),
        ("resmlp_equi_d2", dict(use_symmetrized_asym_feats=True)),
        ("d2_convnext", dict(use_symmetrized_asym_feats=True)),
    ],
)  # fmt: skip
def test_compiled_options(family, options):
    model = trained(family, **options)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    size = options.get("img_size", 32)
    x = images(2, (size, size), dtype=torch.float32)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_compiled_on_images_of_several_sizes():
    model = trained("d2_deit", dynamic_img_size=True)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in [(32, 32), (40, 40), (24, 56), (48, 64), (56, 48)]:
        x = images(2, size, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    # the constructed size, then one graph for odd grids and one for even ones; torch 2.6, which
    # has no `is_exporting` yet, makes one more on the way to them
    assert counter.frame_count == (3 if hasattr(torch.compiler, "is_exporting") else 4)


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


@pytest.mark.parametrize(
    ("family", "training"),
    [
        ("d2_deit", False),
        *((f, True) for f in ("d2_deit", "deit", "resmlp_equi_d2", "d2_convnext_isotropic")),
    ],
)
def test_one_graph_serves_all_blocks(family, training, monkeypatch):
    # the first block's rate is zero, and so a ConvNeXt's has no stochastic depth; torch 2.6
    # compiles anew for each rate
    graphs = 1
    if training and "convnext" in family:
        graphs = 2 if hasattr(torch.compiler, "is_exporting") else 5
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
        torch.testing.assert_close(model(x), eager(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            gradients(model, model, x), gradients(eager, eager, x), rtol=1e-3, atol=1e-5
        )
    assert model.state_dict().keys() == eager.state_dict().keys()


def test_networks_without_known_blocks_are_not_compiled_by_block():
    with pytest.raises(UserError, match=r"RegNet has neither .* --compile-blocks"):
        compile_network(timm.create_model("regnety_002"), blocks=True)


@pytest.mark.slow
def test_compiled_by_inductor_with_gradient_checkpointing():
    model, x = trained("d2_deit").train(), x32()
    expected = gradients(model, model, x)
    model.set_grad_checkpointing()
    compiled = torch.compile(model, fullgraph=True, mode="default")
    torch.testing.assert_close(gradients(model, compiled, x), expected, rtol=1e-3, atol=1e-4)
