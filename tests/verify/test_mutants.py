"""Errors put into the layers' code, some on rare paths only: the layer checks must notice them."""

from types import FunctionType

import pytest
import torch
from timm.layers import DropPath

from deit import layers as L
from deit.verify.breaks import VIT
from deit.verify.layers import LAYER_CASES, check_layer
from deit.verify.networks import check_network
from deit.verify.settings import DTYPES, Settings


def failing(name: str, dtype=torch.float64) -> list[str]:
    """The variants of a layer whose check fails."""
    cases = [case for case in LAYER_CASES if case.name == name]
    assert cases, name
    return [case.variant for case in cases if check_layer(case, Settings(dtype)).failures]


def replace(monkeypatch, cls: type, method: str, make) -> None:
    """Replace a method by `make(original)`."""
    original: FunctionType = getattr(cls, method)
    monkeypatch.setattr(cls, method, make(original))


def last_part(change):
    """A mutant of `map` that changes the last irrep's block of the output."""

    def make(original):
        def mutant(self, parts, **gains):
            *others, last = original(self, parts, **gains)
            return [*others, change(last)]

        return mutant

    return make


class WrongBackward(torch.autograd.Function):
    """The identity, with a gradient that is not equivariant."""

    @staticmethod
    def forward(context, x):
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient):
        return gradient + 0.1 * gradient.abs()


def only_without_gradients(x):
    return x if torch.is_grad_enabled() else x + 0.1


def only_with_gradients(x):
    return x + 0.1 if torch.is_grad_enabled() else x


def test_no_case_fails_as_it_is():
    """Without which the tests below would show nothing."""
    for case in LAYER_CASES:
        for dtype in DTYPES.values():
            assert check_layer(case, Settings(dtype, seed=3)).failures == [], case


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a + 0.01,
        lambda a: a.abs(),
        lambda a: 0 * a,
        lambda a: a * float("nan"),
        WrongBackward.apply,
        only_without_gradients,
        only_with_gradients,
    ],
    ids=["shift", "abs", "dead", "nan", "backward", "inference", "training"],
)
@pytest.mark.parametrize("cls", [L.Linear, L.GELU])
def test_antisymmetric_block(monkeypatch, cls, change):
    replace(monkeypatch, cls, "map", last_part(change))
    assert failing(cls.__name__) == [c.variant for c in LAYER_CASES if c.name == cls.__name__]


def test_only_in_half_precision(monkeypatch):
    replace(
        monkeypatch, L.GELU, "map",
        last_part(lambda a: a + 0.5 if a.dtype == torch.bfloat16 else a),
    )  # fmt: skip
    assert failing("GELU") == failing("GELU", torch.float32) == []
    assert "" in failing("GELU", torch.bfloat16)


def test_one_mean(monkeypatch):
    monkeypatch.setattr(L.LayerNorm, "centre", lambda self, x: x - x.mean(-1, keepdim=True))
    assert set(failing("LayerNorm")) == {"", "channels last", "octic"}


def test_shift_of_all_channels(monkeypatch):
    replace(monkeypatch, L.Affine, "offset", lambda original: lambda self: original(self) + 0.05)
    assert set(failing("Affine")) == {"", "octic", "packed tokens, even", "packed tokens, odd"}
    assert "" in failing("LayerNorm")


def test_kernels_that_are_not_mirrored(monkeypatch):
    def make(original):
        def mutant(self):
            kernel = original(self)
            return kernel * torch.arange(1, kernel.shape[-1] + 1).to(kernel)

        return mutant

    replace(monkeypatch, L.MirrorKernel, "kernel", make)
    for name in ("MirrorConv2d", "ChannelsLastMirrorConv2d", "PatchEmbed", "ConvBlock"):
        assert failing(name) == [case.variant for case in LAYER_CASES if case.name == name]


def test_sign_of_an_odd_kernel_only(monkeypatch):
    def make(original):
        return lambda self: original(self).abs() if self.odd and self.sign < 0 else original(self)

    replace(monkeypatch, L.MirrorKernel, "kernel", make)
    assert failing("MirrorConv2d") == ["3x3, padded"]
    assert set(failing("MirrorDepthwiseConv2d")) == {"7x7", "3x3, no bias, even width"}


def test_token_order_of_odd_grids_only(monkeypatch):
    def make(original):
        return lambda self, x: x.flatten(1, 2) if self.width % 2 else original(self, x)

    replace(monkeypatch, L.MirrorGrid, "to_mirror_order", make)
    assert failing("PatchEmbed") == ["odd grid"]
    assert "to mirror order, odd" in failing("MirrorGrid")


def test_logits_with_the_mixer_only(monkeypatch):
    def make(original):
        def mutant(self, parts):
            q, k, v = original(self, parts)
            return q, k if self.attn_mixer is None else k.flip(-1), v

        return mutant

    replace(monkeypatch, L.Attention, "split_heads", make)
    assert failing("Attention") == failing("Block") == ["mixer"]


def test_stochastic_depth_of_tokens(monkeypatch):
    def drop(self, x):
        if not self.training or not self.drop_prob:
            return x
        return x * torch.bernoulli(torch.full_like(x[..., :1], 0.5))

    monkeypatch.setattr(DropPath, "forward", drop)
    assert failing("Block") == ["stochastic depth"]
    assert failing("ConvBlock") == ["LayerScale, stochastic depth"]


def test_embeddings(monkeypatch):
    replace(monkeypatch, L.PositionEmbedding, "packed",
            lambda original: lambda self, *grid: original(self, *grid).abs())  # fmt: skip
    replace(monkeypatch, L.PrefixToken, "forward",
            lambda original: lambda self, batch: original(self, batch) + 0.01)  # fmt: skip
    assert set(failing("PositionEmbedding")) == {"even", "odd", "resampled"}
    assert failing("PrefixToken") == [""]


@pytest.mark.parametrize(
    ("cls", "method", "make", "blamed"),
    [
        (L.Linear, "map", last_part(lambda a: a + 0.1), "Linear"),
        (L.GELU, "map", last_part(lambda a: a.abs()), "GELU"),
        (L.LayerNorm, "centre", lambda _: lambda self, x: x - x.mean(-1, True), "LayerNorm"),
        (L.PrefixToken, "forward", lambda f: lambda self, batch: f(self, batch) + 1, "PrefixToken"),
        (L.MirrorGrid, "to_mirror_order", lambda _: lambda self, x: x.flatten(1, 2), "PatchEmbed"),
        (L.Mlp, "forward", lambda f: lambda self, x: f(self, x.flip(-1)), "Mlp"),
    ],
)
def test_networks_name_the_layer(monkeypatch, cls, method, make, blamed):
    """All layers of a kind are wrong at once: the first of them is to blame."""
    replace(monkeypatch, cls, method, make)
    result = check_network(VIT, Settings(torch.float32))
    module = VIT.build().get_submodule(result.culprit.culprit)
    assert type(module).__name__ == blamed
    assert result.culprit.culprit in result.failures[0]
