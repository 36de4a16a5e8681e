"""The fused paths on CPUs against the layers' plain formulas."""

import pytest
import timm
import torch

import deit.models  # noqa: F401 - registers the networks
from deit import kernels
from deit.equivariance import assert_equivariant, randomize_
from deit.groups import FLOP, OCTIC, Rep
from deit.kernels import cpu, cpu_perceptron
from deit.layers import Attention, Linear, MixerBlock, Mlp, fused
from deit.layers.activation import quick_gelu

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason="PyTorch was built without oneDNN")


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def reference(layer, x):
    """The plain formula in float64."""
    with kernels.plain():
        return layer.double()(x.double())


def compare(layer, x):
    randomize_(layer.eval())
    with torch.no_grad():
        actual = layer(x)
        expected = reference(layer, x)
    assert actual.shape == x.shape
    assert relative(actual, expected) < 2e-6
    return actual


def spy(monkeypatch, name):
    """Count the calls of a fused path."""
    module = cpu_perceptron if name == "perceptron" else cpu
    calls, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(name) or original(*args))
    return calls


def gradients(layer, x, run=None):
    """Of some loss, in x and in all parameters."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = (layer if run is None else run)(x)
    (y.square().sum() + y.sum()).backward()
    return torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in layer.parameters())])


@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 1, 24), (7, 24), (2, 3, 4, 24), (3, 400, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_perceptron(shape, bias, monkeypatch):
    calls = spy(monkeypatch, "perceptron")
    compare(Mlp(24, 80, bias=bias), torch.randn(shape))
    assert calls == ["perceptron"]


def test_perceptron_of_a_feature_that_is_not_contiguous(monkeypatch):
    calls = spy(monkeypatch, "perceptron")
    compare(Mlp(24, 80), torch.randn(24, 5, 2).permute(2, 1, 0))
    assert calls


def test_perceptron_in_several_pieces(monkeypatch):
    monkeypatch.setattr(cpu, "PIECE", 2**12)
    monkeypatch.setattr(cpu_perceptron, "LEAST_ROWS", 3)
    assert len(cpu.pieces(50, 80, 3)) == 4
    compare(Mlp(24, 80), torch.randn(5, 10, 24))


MIXER = dict(channels=FLOP.regular(16), tokens=Rep(FLOP, free=6), init_values=0.5)


@pytest.mark.parametrize("piece", [2**10, 2**20])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: Mlp(24, 80), (5, 30, 24)),
        (lambda: Mlp(24, 80, bias=False), (7, 24)),
        (lambda: MixerBlock(**MIXER).mlp, (3, 12, 16)),
        (lambda: Mlp(16, 64, act=quick_gelu), (2, 3, 4, 16)),
    ],
    ids=["bias", "no bias", "decomposed tokens", "quick_gelu"],
)
def test_gradients_of_a_perceptron(layer, shape, piece, monkeypatch):
    monkeypatch.setattr(cpu, "PIECE", piece)
    monkeypatch.setattr(cpu_perceptron, "LEAST_ROWS", 3)
    calls = spy(monkeypatch, "perceptron")
    layer, x = randomize_(layer()), torch.randn(shape)
    actual = gradients(layer, x)
    torch.compiler.reset()
    compiled = gradients(layer, x, torch.compile(layer, backend="aot_eager", fullgraph=True))
    assert len(calls) >= 2
    with kernels.plain():
        expected = gradients(layer.double(), x.double())
    assert relative(actual, expected) < 2e-6
    assert relative(compiled, expected) < 2e-6


def test_frozen_weights_get_no_gradient():
    mlp = Mlp(24, 80)
    mlp.fc1.requires_grad_(False)
    mlp(torch.randn(3, 24)).sum().backward()
    assert all(p.grad is None for p in mlp.fc1.parameters())
    assert all(p.grad is not None for p in mlp.fc2.parameters())


def test_a_perceptron_keeps_its_input_alone():
    mlp, x = Mlp(24, 80), torch.randn(50, 24)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp(x)
    weights = {p.data_ptr() for p in mlp.parameters()}
    activations = sum(t.numel() for t in kept if t.data_ptr() not in weights)
    assert activations == x.numel()


@pytest.mark.parametrize("piece", [2**10, 2**20])
def test_mixer_block_with_decomposed_tokens(piece, monkeypatch):
    monkeypatch.setattr(cpu, "PIECE", piece)
    first, second = spy(monkeypatch, "mix_tokens"), spy(monkeypatch, "perceptron")
    block = MixerBlock(**MIXER)
    compare(block, torch.randn(3, 12, 16))
    assert (len(first), len(second)) == (1, 1)


def test_a_middle_column_leaves_the_mixer_to_the_plain_formula(monkeypatch):
    first, second = spy(monkeypatch, "mix_tokens"), spy(monkeypatch, "perceptron")
    compare(MixerBlock(FLOP.regular(16), Rep(FLOP, free=3, fixed=3)), torch.randn(2, 9, 16))
    assert first == second == []


@pytest.mark.parametrize("piece", [2**8, 2**20])
@pytest.mark.parametrize("bias", [True, False])
def test_attention(piece, bias, monkeypatch):
    monkeypatch.setattr(cpu, "PIECE", piece)
    calls = spy(monkeypatch, "attention")
    compare(Attention(24, 3, qkv_bias=bias, use_fused_attn=True), torch.randn(5, 7, 24))
    assert calls


def test_what_the_fused_attention_leaves_alone(monkeypatch):
    calls = spy(monkeypatch, "attention")
    x = torch.randn(2, 7, 24)
    with torch.no_grad():
        Attention(24, 3, use_attn_mixer=True).eval()(x)
        Attention(24, 3, use_fused_attn=False).eval()(x)
        Attention(24, 3, use_fused_attn=True, attn_drop=0.5).train()(x)
        Attention(24, 3, use_fused_attn=True).eval().double()(x.double())
    Attention(24, 3, use_fused_attn=True).eval()(x)  # gradients may be wanted
    assert calls == []


def test_dropout_in_inference_is_no_obstacle(monkeypatch):
    calls = spy(monkeypatch, "perceptron")
    mlp = Mlp(24, 80, drop=0.5)
    with torch.no_grad():
        mlp.train()(torch.randn(2, 24))
        assert calls == []
        mlp.eval()(torch.randn(2, 24))
    assert calls == ["perceptron"]


def test_applies():
    x, w = torch.randn(2, 3), torch.nn.Parameter(torch.randn(3, 3))
    assert not cpu.applies(x, w)  # it requires a gradient
    with torch.no_grad():
        assert cpu.applies(x, w)
        assert cpu.applies(x, w, None)
        assert not cpu.applies(x.double(), w)
        assert not cpu.applies(x, w.double())
        assert not cpu.applies(x.to("meta"), w)
        assert not cpu.applies(x[:0], w)
        assert cpu.applies(x, w, training=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not cpu.applies(x, w)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not cpu.applies(x, w)
        with kernels.plain():
            assert not cpu.applies(x, w)


def test_another_group_or_function_is_left_alone():
    x = torch.randn(2, 8)
    with torch.no_grad():
        other = Mlp(8, 16, act=torch.relu)
        assert fused.perceptron(x, other.fc1, other.act, other.fc2, None) is None
        other = Mlp(8, 16, group=OCTIC)
        assert fused.perceptron(x, other.fc1, other.act, other.fc2, None) is None


def test_no_piece_is_empty_and_none_is_missing():
    for rows in (1, 2, 7, 1000):
        for width in (1, 10**4, 10**7):
            pieces = cpu.pieces(rows, width, 3)
            assert [i for piece in pieces for i in range(rows)[piece]] == list(range(rows))
            assert all(piece.stop > piece.start for piece in pieces)


SMALL = [
    ("d2_deit_tiny_patch16_LS", {"embed_dim": 24, "num_heads": 3, "depth": 2}),
    ("d2_inv_early_deit_tiny_patch16_LS", {"embed_dim": 24, "num_heads": 3, "depth": 2}),
    ("resmlp_equi_d2_12", {"embed_dim": 16, "depth": 2}),
    ("d2_convnext_isotropic_small", {"embed_dim": 16, "depth": 2}),
]


def small(name, options):
    network = timm.create_model(name, num_classes=5, img_size=32, **options)
    return randomize_(network.eval())


@pytest.mark.parametrize(("name", "options"), SMALL, ids=[name for name, _ in SMALL])
def test_networks(name, options):
    network, x = small(name, options), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = reference(network, x)
        network.float()
        fast = network(x)
        torch.compiler.reset()
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)(x)
        flopped = network(x.flip(-1))
    with torch.inference_mode():
        assert relative(network(x), expected) < 1e-5
    assert relative(fast, expected) < 1e-5
    assert relative(compiled, expected) < 1e-5
    assert relative(flopped, fast) < 1e-5


def test_layers_stay_equivariant():
    attention = randomize_(Attention(24, 3, use_fused_attn=True).eval())
    with torch.no_grad():
        report = assert_equivariant(
            attention, FLOP, torch.randn(2, 6, 24), attention.rep.act, attention.rep.act
        )
    assert report.error < 1e-6


def test_operators():
    weights = [torch.randn(20, 12) for _ in range(2)], [torch.randn(12, 20) for _ in range(2)]
    x = torch.randn(2, 6, 24)
    torch.library.opcheck(
        torch.ops.deit.cpu_perceptron.default,
        (x, weights[0], [torch.randn(20)], weights[1], [], "gelu", 0),
    )
    # strides, too, must be those that a compiler is told
    weights = [torch.randn(12, 20).t() for _ in range(2)], [torch.randn(20, 12).t()] * 2
    torch.library.opcheck(
        torch.ops.deit.cpu_perceptron_backward.default,
        (x, x, weights[0], [torch.randn(20)], weights[1], [], "gelu", 0),
    )
    qkv, proj = ([torch.randn(n, 12) for _ in range(2)] for n in (36, 12))
    torch.library.opcheck(torch.ops.deit.cpu_attention.default, (x, qkv, [], proj, [], 3))
    mix = [torch.randn(3, 3) for _ in range(2)]
    torch.library.opcheck(torch.ops.deit.cpu_mix_tokens.default, (x, mix, []))


def test_linear_is_untouched_on_cpu():
    layer = Linear(8, 8).eval()
    with torch.no_grad():
        assert fused.linear(torch.randn(2, 8), layer) is None
