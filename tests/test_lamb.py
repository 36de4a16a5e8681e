"""timm's LAMB makes apex's updates, in its corner cases."""

import apex_double
import pytest
import torch
from timm.optim import Lamb
from torch import nn

SHAPES = [(5, 7), (7,), (1, 3, 6), (4, 3, 2, 2), (1,), ()]


def make_params():
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    with torch.no_grad():
        params[2].zero_()  # a weight of norm zero has trust ratio 1
    return params


def groups(params):
    """Groups of three different decays, a learning rate of its own for one."""
    return [
        {"params": params[:2], "weight_decay": 0.3},
        {"params": params[2:4], "weight_decay": 0.02, "lr": 0.01},
        {"params": params[4:], "weight_decay": 0.0},
    ]


def train(params, optimizer, steps, scale=1.0):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for i, p in enumerate(params):
            grad = scale * torch.randn(p.shape, generator=generator)
            p.grad = None if (i, step) == (1, 3) else grad
        optimizer.step()


@pytest.mark.parametrize("foreach", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("scale", [3.0, 0.01], ids=["clipped", "unclipped"])
def test_same_updates_as_apex_over_20_steps(scale, foreach):
    ours, theirs = make_params(), make_params()
    train(ours, Lamb(groups(ours), lr=0.02, foreach=foreach), range(20), scale)
    train(theirs, apex_double.FusedLAMB(groups(theirs), lr=0.02), range(20), scale)
    for a, b, start in zip(ours, theirs, make_params(), strict=True):
        assert (a - start).abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lamb", [Lamb, apex_double.FusedLAMB])
def test_first_step_by_hand(lamb):
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    p.grad = torch.tensor([6.0, -8.0])
    lamb([p], lr=0.1, eps=0.0, weight_decay=0.5).step()
    # Bias-corrected, the first m / sqrt(v) is the sign of the gradient, whatever the clipping.
    update = torch.tensor([1.0, -1.0]) + 0.5 * torch.tensor([3.0, 4.0])
    expected = torch.tensor([3.0, 4.0]) - 0.1 * 5 / update.norm() * update
    torch.testing.assert_close(p.detach(), expected)
    assert torch.equal(p.grad, torch.tensor([6.0, -8.0])), "clipping must not touch the gradient"
