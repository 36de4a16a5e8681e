"""LayerNorm: irreps centred on their own, divided by a common deviation."""

import pytest
import torch
from checks import BOTH_GROUPS, Packed, breaks, check, close, features, few, random_layer
from hypothesis import given
from hypothesis import strategies as st

from deit.equivariance import channels
from deit.groups import FLOP, Rep
from deit.layers import LayerNorm


@BOTH_GROUPS
@few
@given(st.integers(2, 5), st.sampled_from([1e-6, 0.3]))
def test_equivariant(group, n, eps):
    layer = Packed(LayerNorm(8 * n, eps, group=group))
    check(layer, features(3, 5, 8 * n), channels(layer.rep), channels(layer.rep), group)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_formula(eps):
    layer = random_layer(LayerNorm(10, eps))
    s, a = features(4, 3, 10).chunk(2, -1)
    variance = s.var(-1, correction=0, keepdim=True) + a.var(-1, correction=0, keepdim=True)
    sigma = ((variance + eps) / 2).sqrt()
    scaling = layer.scaling
    expected = torch.cat(
        [
            scaling.alpha_sym * (s - s.mean(-1, keepdim=True)) / sigma + scaling.beta,
            scaling.alpha_asym * (a - a.mean(-1, keepdim=True)) / sigma,
        ],
        -1,
    )
    close(Packed(layer)(torch.cat([s, a], -1)), expected)


@BOTH_GROUPS
def test_output_has_unit_scale(group):
    y = Packed(LayerNorm(64, eps=0, group=group)).double()(7 + 30 * features(5, 64))
    close(y.square().mean(-1), torch.ones(5, dtype=torch.float64))
    # and every component of every irrep is centred
    for block, irrep in zip(group.regular(64).split(y), group.irreps, strict=True):
        means = block.unflatten(-1, (irrep.dim, -1)).mean(-1)
        close(means, torch.zeros_like(means))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    layer = Packed(LayerNorm(512))
    x = (300 * features(16, 512)).to(dtype)  # squares overflow float16, their sum loses bfloat16
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x.float()), rtol=8e-3, atol=1e-5)


@BOTH_GROUPS
def test_broken_twins_are_found(group):
    layer = random_layer(Packed(LayerNorm(16, group=group)))
    x, action = features(3, 4, 16), channels(layer.rep)
    # an ordinary layer norm: one mean, a shift of all channels
    plain = random_layer(torch.nn.LayerNorm(16))
    breaks(plain, x, action, action, group)
    shift = torch.ones(16, dtype=torch.float64)
    breaks(lambda y: layer(y + shift) + shift, x, action, action, group)


def test_only_whole_copies_of_the_regular_representation():
    with pytest.raises(ValueError, match="whole copies"):
        LayerNorm(Rep(FLOP, 3, 1))


@BOTH_GROUPS
def test_what_is_compiled_is_the_same(group):
    layer = random_layer(Packed(LayerNorm(16, group=group)))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for run in (layer, compiled):
        x = features(3, 5, 16).requires_grad_()
        y = run(x)
        loss = (y * torch.linspace(0, 1, y.numel()).view_as(y).to(y)).square().sum()
        results.append((y, *torch.autograd.grad(loss, [x, *layer.parameters()])))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)
