"""Whole blocks: their formulas, stochastic depth, and the ordinary one that is written here."""

import pytest
import torch
from checks import Packed, close, features, halves, random_layer
from timm.models.convnext import ConvNeXtBlock as TimmConvBlock

from deit.groups import FLOP, FLOP_X_FLOP, Rep
from deit.layers import (
    Block,
    ConvBlock,
    MixerBlock,
    OrdinaryConvBlock,
    OrdinaryMixerBlock,
    quick_gelu,
)

EIGHT = FLOP.regular(8)


def quarters(x: torch.Tensor, tokens: Rep) -> tuple[torch.Tensor, ...]:
    """ss, sa, as, aa (channels first) of (B, tokens, 2c), symmetric tokens in the first rows."""
    return tuple(q for part in halves(x) for q in tokens.split(part, 1))


@pytest.mark.parametrize("middle", [0, 2])
def test_mixer_block(middle):
    """lin_sym of the tokens on ss and as, of the channels on ss and sa; shifts on ss and on aa;
    GELU by the 4-point Hadamard transform, with a factor one half each way.

    Middle tokens have no sa and no aa: GELU by the 2-point transform, and at their places the
    shift of the others."""
    axis = Rep(FLOP, 3, middle)
    layer = random_layer(MixerBlock(EIGHT, axis))
    x = features(2, axis.size, 8)
    tokens, fc1, fc2 = layer.attn, layer.mlp.fc1, layer.mlp.fc2
    blocks = (tokens.lin_sym, tokens.lin_asym, tokens.lin_sym, tokens.lin_asym)
    normed = quarters(Packed(layer.norm1)(x), axis)
    ss, sa, as_, aa = (q.mT @ block.weight.T for q, block in zip(normed, blocks, strict=True))
    ss, aa = ss + tokens.lin_sym.bias, aa + tokens.lin_asym.bias
    mixed = torch.cat([torch.cat([ss, sa], 2).mT, torch.cat([as_, aa], 2).mT], -1)
    y = x + Packed(layer.gamma_1)(mixed)

    def on_channels(four, linear):
        blocks = [linear.lin_sym, linear.lin_sym, linear.lin_asym, linear.lin_asym]
        out = [part @ block.weight.T for part, block in zip(four, blocks, strict=True)]
        return out[0] + linear.lin_sym.bias, out[1], out[2], out[3] + linear.lin_asym.bias

    def on_middle(s, a, linear):
        s, a = s @ linear.lin_sym.weight.T, a @ linear.lin_asym.weight.T
        return s + linear.lin_sym.bias / 2**0.5, a

    hadamard = FLOP_X_FLOP.change_of_basis
    ss, sa, as_, aa = quarters(Packed(layer.norm2)(y), axis)
    s, a = on_middle(ss[:, 3:], as_[:, 3:], fc1)
    plus, minus = (quick_gelu((s + sign * a) / 2**0.5) for sign in (1, -1))
    s, a = on_middle((plus + minus) / 2**0.5, (plus - minus) / 2**0.5, fc2)
    hidden = torch.stack(on_channels((ss[:, :3], sa, as_[:, :3], aa), fc1))
    hidden = quick_gelu(torch.tensordot(hadamard, hidden, 1))
    ss, sa, as_, aa = on_channels(torch.tensordot(hadamard, hidden, 1).unbind(0), fc2)
    out = torch.cat([torch.cat([ss, s, sa], 1), torch.cat([as_, a, aa], 1)], -1)
    close(Packed(layer, EIGHT)(x), y + Packed(layer.gamma_2)(out))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Packed(Block(8, 2, drop_path=0.5), EIGHT), (6, 8)),
        (Packed(MixerBlock(EIGHT, Rep(FLOP, 3), drop_path=0.5), EIGHT), (6, 8)),
        (Packed(ConvBlock(8, drop_path=0.5, init_value=0.1), EIGHT), (2, 3, 8)),
        (OrdinaryMixerBlock(8, 6, drop_path=0.5), (6, 8)),
        (OrdinaryConvBlock(8, drop_path=0.5, init_value=0.1), (2, 3, 8)),
    ],
)
def test_stochastic_depth_draws_one_mask_a_sample_for_both_halves(layer, shape):
    random_layer(layer)
    x = features(64, *shape)
    assert torch.equal(layer(x), layer(x))  # not in evaluation
    layer.train()
    torch.manual_seed(0)
    with torch.no_grad():
        change = (layer(x) - x).flatten(1)
    dropped = change.count_nonzero(1) == 0
    # a transformer's two branches are both dropped for a quarter of the samples
    assert 4 <= dropped.sum() <= 50
    parts = change.view(64, *shape)[~dropped].unflatten(-1, (2, 4)).abs().flatten(1, -3).sum(1)
    assert (parts > 0).all()


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_ordinary_conv_block_is_timms_under_other_keys(value):
    """And the initial LayerScale comes back. Of the others `tests/models` compares networks."""
    ours = random_layer(OrdinaryConvBlock(8, init_value=value))
    names = {"dwconv": "conv_dw", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
    state = {}
    for key, tensor in ours.state_dict().items():
        layer, dot, leaf = key.partition(".")
        state[names.get(layer, layer) + dot + leaf] = tensor
    theirs = TimmConvBlock(8, ls_init_value=value or None, conv_mlp=True).double().eval()
    theirs.load_state_dict(state)
    x = features(2, 6, 5, 8)
    close(ours(x), theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    ours.reset_parameters()
    assert all((p == value).all() for name, p in ours.named_parameters() if name == "gamma")
