"""What layers compute, by the formulas of the specification."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from checks import BOTH_GROUPS, Packed, cat, close, features, halves, random_layer
from timm.models.convnext import ConvNeXtBlock as TimmConvBlock
from torch import nn

from deit.groups import FLOP, FLOP_X_FLOP, OCTIC, Rep
from deit.layers import (
    GELU,
    Affine,
    Attention,
    Block,
    ConvBlock,
    InvariantBridge,
    LayerNorm,
    LayerScale,
    Linear,
    MirrorDepthwiseConv2d,
    MixerBlock,
    Mlp,
    OrdinaryAffine,
    OrdinaryConvBlock,
    OrdinaryMixerBlock,
    quick_gelu,
)

EIGHT = FLOP.regular(8)

# linear maps


def test_linear():
    layer = random_layer(Linear(6, 10))
    s, a = halves(features(4, 6))
    sym, asym = layer.linear_sym, layer.linear_asym
    close(cat(layer((s, a))), torch.cat([s @ sym.weight.T + sym.bias, a @ asym.weight.T], -1))
    assert asym.bias is None


def test_every_part_of_an_invariant_feature_can_be_shifted():
    """Where the group moves places alone, both maps act on each place with their shifts; but on
    rows that it leaves in place. One call of each block, whatever it is."""
    s, a = features(2, 5, 2), features(2, 5, 2, seed=1)
    for rows in (None, (2, 1), (0, 2), (3, 2), (0, 5)):
        layer = random_layer(Linear(4, 6, invariant=True, unshifted=rows))
        calls = []
        layer.linear_asym.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        y = layer((s, a))
        close(y[0], layer.linear_sym(s))
        shift = layer.linear_asym.bias.repeat(5, 1)
        if rows:
            shift[rows[0] : sum(rows)] = 0
        close(y[1], a @ layer.linear_asym.weight.T + shift)
        assert calls == [1]
        layer.linear_asym = nn.Sequential(layer.linear_asym)  # has no weight to look at
        close(layer((s, a))[1], y[1])


@pytest.mark.parametrize("assign", [False, True])
def test_pointwise_weights_look_like_those_of_a_convolution(assign):
    """They share memory with the parameters. Both shapes load, and stay as they were given."""
    plain, conv = random_layer(Linear(6, 8)), Linear(6, 8, pointwise=True).double()
    state = plain.state_dict()
    shown = {k: v[..., None, None] if v.ndim == 2 else v for k, v in state.items()}
    for each in (shown, state):
        given = {k: v.shape for k, v in each.items()}
        conv.load_state_dict(each, assign=assign)
        assert {k: v.shape for k, v in each.items()} == given
        own = conv.state_dict()
        assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in shown.items()}
        assert conv.linear_sym.weight.shape == (4, 3)
        x = features(2, 3, 3, 6)
        close(Packed(conv)(x), Packed(plain)(x))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(conv)))
    assert copied.state_dict()["linear_asym.weight"].shape == (4, 3, 1, 1)
    own["linear_sym.weight"].zero_()
    assert not conv.linear_sym.weight.any()
    assert conv.state_dict(keep_vars=True)["linear_sym.weight"] is conv.linear_sym.weight


def test_a_linear_map_has_a_block_an_irrep():
    """Half the weights of a dense map."""
    assert sum(block.weight.numel() for block in Linear(64, 32).blocks()) == 64 * 32 // 2
    # the octic group: four blocks of an eighth each way and one of a quarter, used twice
    octic = Linear(64, 32, group=OCTIC)
    assert sum(block.weight.numel() for block in octic.blocks()) == 64 * 32 * (4 + 4) // 64
    assert [name for name, _ in Linear(8, 12, group=FLOP_X_FLOP).named_parameters()] == [
        "linear_sym_sym.weight", "linear_sym_sym.bias", "linear_sym_asym.weight",
        "linear_asym_sym.weight", "linear_asym_asym.weight",
    ]  # fmt: skip


# pointwise layers


@pytest.mark.parametrize(
    ("act", "formula"),
    [(F.gelu, F.gelu), (quick_gelu, lambda x: x * torch.sigmoid(1.702 * x))],
    ids=["gelu", "quick"],
)
def test_gelu(act, formula):
    s, a = halves(features(4, 6))
    plus, minus = formula((s + a) / 2**0.5), formula((s - a) / 2**0.5)
    close(cat(GELU(6, act)((s, a))), torch.cat([plus + minus, plus - minus], -1) / 2**0.5)


@BOTH_GROUPS
def test_scaled_features_stay_scaled(group):
    x = features(3, 5, 16)
    plain, scaled = Packed(GELU(16, group=group)), Packed(GELU(16, group=group, scale=3.0))
    close(scaled(3 * x), 3 * plain(x))


def test_scales_and_their_initial_values():
    layer, x = LayerScale(6, 1e-5), features(2, 6)
    assert list(layer.state_dict()) == ["alpha_sym", "alpha_asym"]
    torch.testing.assert_close(Packed(layer)(x), 1e-5 * x)
    random_layer(layer)
    close(Packed(layer)(x), x * torch.cat([layer.alpha_sym, layer.alpha_asym]))
    layer.reset_parameters()
    torch.testing.assert_close(Packed(layer)(x), 1e-5 * x)
    ordinary = random_layer(OrdinaryAffine(6))
    close(ordinary(x), ordinary.alpha * x + ordinary.beta)
    ordinary.reset_parameters()
    assert torch.equal(ordinary(x), x)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_layer_norm(eps):
    layer = random_layer(LayerNorm(10, eps))
    s, a = halves(features(4, 3, 10))
    variance = s.var(-1, correction=0, keepdim=True) + a.var(-1, correction=0, keepdim=True)
    sigma, scaling = ((variance + eps) / 2).sqrt(), layer.scaling
    y = layer((s, a))
    close(y[0], scaling.alpha_sym * (s - s.mean(-1, keepdim=True)) / sigma + scaling.beta)
    close(y[1], scaling.alpha_asym * (a - a.mean(-1, keepdim=True)) / sigma)


@BOTH_GROUPS
def test_normed_features_have_unit_scale(group):
    y = Packed(LayerNorm(64, eps=0, group=group)).double()(7 + 30 * features(5, 64))
    close(y.square().mean(-1), torch.ones(5, dtype=torch.float64))
    # and every component of every irrep is centred
    for block, irrep in zip(group.regular(64).split(y), group.irreps, strict=True):
        means = block.unflatten(-1, (irrep.dim, -1)).mean(-1)
        close(means, torch.zeros_like(means))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_computes_in_float32(dtype):
    layer = Packed(LayerNorm(512))
    x = (300 * features(16, 512)).to(dtype)  # squares overflow float16, their sum loses bfloat16
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x.float()), rtol=8e-3, atol=1e-5)


# perceptron and attention


@pytest.mark.parametrize("mixer", [None, (1.0, 0.0), (0.7, -0.4)])
def test_attention(mixer):
    """Head by head: q = [q_s, q_a], each irrep's outputs laid out (3, heads, width)."""
    dim, heads = 12, 3
    width = dim // heads // 2
    layer = random_layer(
        Attention(dim, heads, use_attn_mixer=mixer is not None, use_fused_attn=False)
    )
    m = mixer or (1.0, 1.0)
    if mixer:
        layer.attn_mixer.data = torch.tensor(mixer, dtype=torch.float64)
    s, a = halves(features(2, 5, dim))
    sym, asym = (part.view(2, 5, 3, heads, width) for part in layer.qkv((s, a)))
    outputs = []
    for h in range(heads):
        (q_s, k_s, v_s), (q_a, k_a, v_a) = sym[..., h, :].unbind(2), asym[..., h, :].unbind(2)
        logits = (m[0] * q_s @ k_s.mT + m[1] * q_a @ k_a.mT) * (dim / heads) ** -0.5
        outputs.append((logits.softmax(-1) @ v_s, logits.softmax(-1) @ v_a))
    expected = layer.proj(tuple(torch.cat(parts, -1) for parts in zip(*outputs, strict=True)))
    close(cat(layer((s, a))), cat(expected))


@BOTH_GROUPS
def test_fused_attention_is_explicit_attention(group):
    fused = random_layer(Attention(16, 2, use_fused_attn=True, group=group))
    explicit = Attention(16, 2, use_fused_attn=False, group=group).double()
    explicit.load_state_dict(fused.state_dict())
    assert (fused.fused_attn, explicit.fused_attn) == (True, False)
    x = features(3, 7, 16)
    close(Packed(fused)(x), Packed(explicit)(x))
    # left to the layer, fused attention gives way to the mixer, which starts at the trivial irrep
    mixed = Attention(16, 2, use_attn_mixer=True, group=group)
    assert not mixed.fused_attn
    assert mixed.attn_mixer.tolist() == [1] + [0] * (len(group.irreps) - 1)


@pytest.mark.parametrize(
    "layer",
    [
        Mlp(8, 16, drop=0.5),
        Attention(8, 2, attn_drop=0.5, use_fused_attn=True),
        Attention(8, 2, attn_drop=0.5, use_fused_attn=False),
        Attention(8, 2, proj_drop=0.5),
    ],
)
def test_dropout_acts_in_training_alone(layer):
    layer, x = Packed(layer, EIGHT), features(2, 6, 8).float()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# blocks


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


# errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(7, 4), r"7 features.*multiple of 2"),
        (lambda: Linear(16, 12, group=OCTIC), r"12 features.*multiple of 8"),
        (lambda: Linear(FLOP.regular(8), OCTIC.regular(8)), "different groups: flop and octic"),
        (lambda: LayerNorm(Rep(FLOP, 3, 1)), "whole copies"),
        (lambda: Attention(10, 2), r"width 10 .* 2 heads .* multiple of 4"),
        (lambda: Attention(8, 2, use_fused_attn=True, use_attn_mixer=True), "never forms"),
        (lambda: Affine(16, group=OCTIC, across=OCTIC.regular(8)), "more than one dimension"),
        (lambda: InvariantBridge(16, OCTIC), "more than one dimension"),
        (lambda: MirrorDepthwiseConv2d(6), r"6 channels.*multiple of 4"),
        (lambda: MirrorDepthwiseConv2d(8, 4), r"size 4 has no centre.*odd"),
    ],
)
def test_errors_name_the_rule(make, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        make()
