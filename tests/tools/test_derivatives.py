"""Derivatives beyond the first, forward ones and batched ones, by autograd and by torch.func.

torch's fused attention has a first derivative alone, so these take its plain form, which
`use_fused_attn=False` or torch's own context chooses.
"""

from __future__ import annotations

import pytest
import torch
from networks import create
from tiny import x32
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.fixture(autouse=True)
def _plain_attention():
    with sdpa_kernel(SDPBackend.MATH):
        yield


def test_second_derivatives(network):
    """They are those of differences of first ones, and reach all parameters."""
    model, x = create(network).double(), x32().double().requires_grad_()
    direction = torch.randn_like(x)

    def gradient(z, create_graph=False):
        return torch.autograd.grad(model(z).square().mean(), z, create_graph=create_graph)[0]

    first = gradient(x, True)
    first.square().sum().backward(retain_graph=True)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    if network == "vit":  # whose head sees s alone
        gradients.pop("norm.scaling.alpha_asym")
    assert [n for n, g in gradients.items() if g is None or not g.any()] == []
    (product,) = torch.autograd.grad((first * direction).sum(), x)
    step = 1e-5 * direction
    ahead, behind = (gradient((x + sign * step).detach().requires_grad_()) for sign in (1, -1))
    torch.testing.assert_close(product, (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-7)


def test_functional_transforms(network):
    """Gradients of each sample, as differential privacy needs them, and forward derivatives."""
    model, x = create(network), x32(3)
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(each[name][i], parameter.grad, rtol=1e-3, atol=1e-3)

    tangents = {n: torch.randn_like(p) for n, p in parameters.items()}
    _, derivative = jvp(lambda p: loss(p, x[0]), (parameters,), (tangents,))
    expected = sum((each[n][0] * tangents[n]).sum() for n in parameters)
    torch.testing.assert_close(derivative, expected, rtol=1e-3, atol=1e-2)
