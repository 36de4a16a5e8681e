"""State dicts of networks, with weights as matrices and shown as 1x1 convolutions."""

from __future__ import annotations

import pytest
import torch
from networks import create, images, inner_linears


def flat(state: dict) -> dict:
    """The same with all weights of linear maps as matrices."""
    linear = "_sym.weight", "_asym.weight"
    return {k: v.flatten(1) if k.endswith(linear) and v.shape[2:] == (1, 1) else v.clone()
            for k, v in state.items()}  # fmt: skip


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_both_shapes_load_strictly(network, assign):
    model, x = create(network), images()
    y, state = model(x), model.state_dict()
    shown = {name: state[f"{name}.weight"].ndim for name in inner_linears(model)}
    assert set(shown.values()) == ({4} if "convnext" in network else {2})
    for loaded in (state, flat(state)):
        device = "meta" if assign else "cpu"
        other = create(network, device=device)
        if not assign:
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.zero_()
        before = {k: v.clone() for k, v in loaded.items()}
        other.load_state_dict(loaded, assign=assign)
        assert not any(p.is_meta for p in other.parameters())
        torch.testing.assert_close(other(x), y)
        assert {k: v.shape for k, v in other.state_dict().items()} == {
            k: v.shape for k, v in state.items()
        }
        # what was given is left as it was
        assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in before.items()}
    assert all(module.weight.ndim == 2 for module in inner_linears(other).values())


def test_a_state_dict_shares_memory_with_the_network(network):
    model, x = create(network), images()
    before = model(x)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.mul_(1.5)
    assert not torch.allclose(model(x), before, rtol=1e-2)
    kept = model.state_dict(keep_vars=True)
    for name, parameter in model.named_parameters():
        assert kept[name] is parameter
