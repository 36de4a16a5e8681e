"""ConvNeXt, isotropic and hierarchical."""

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from tiny import create, create_random, images
from torch import nn

from deit.equivariance import assert_equivariant, equivariance_error, image, invariant
from deit.groups import FLOP
from deit.layers import MirrorKernel, tracing
from deit.models import ConvNeXt, IsotropicConvNeXt

EQUIVARIANT = pytest.mark.parametrize("family", ["d2_convnext_isotropic", "d2_convnext"])
ALL = pytest.mark.parametrize(
    "family", ["d2_convnext_isotropic", "d2_convnext", "convnext_isotropic"]
)


@EQUIVARIANT
@pytest.mark.parametrize("symmetrized", [False, True])
def test_head_formula(family, symmetrized):
    """The table: the mean of s, and of |a| if asked for, LayerNorm, linear."""
    model = create_random(family, use_symmetrized_asym_feats=symmetrized)
    (last,) = model.forward_intermediates(images(), indices=1, intermediates_only=True)
    s, a = last.chunk(2, 1)
    x = s.mean((2, 3))
    if symmetrized:
        x = torch.cat([x, a.abs().mean((2, 3))], 1)
    x = nn.functional.layer_norm(x, x.shape[1:], model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(model(images()), model.head(x))
    assert model.num_features == last.shape[1]
    assert model.head_hidden_size == x.shape[1]


@pytest.mark.parametrize(
    ("family", "stem"),
    [("d2_convnext_isotropic", "stem"), ("d2_convnext", "downsample_layers.0.0")],
)
def test_the_stem_has_the_factor_root_one_half(family, stem):
    assert create(family).get_submodule(stem).scale == pytest.approx(0.5**0.5)


@EQUIVARIANT
@pytest.mark.parametrize("size", [(32, 64), (35, 64), (80, 16), (32, 80)])
@pytest.mark.parametrize("symmetrized", [False, True])
def test_any_image_whose_width_the_strides_divide(family, size, symmetrized):
    model = create_random(family, use_symmetrized_asym_feats=symmetrized)
    assert_equivariant(model, FLOP, images(size=size), image(FLOP), invariant)


@pytest.mark.parametrize("width", [24, 40, 72])
def test_odd_widths_of_the_last_map(width):
    """Where nothing is downsampled behind it, an odd map has a column that is its own mirror."""
    model = create_random("d2_convnext_isotropic")
    assert model.forward_features(images(size=(16, width))).shape[-1] % 2
    assert_equivariant(model, FLOP, images(size=(16, width)), image(FLOP), invariant)


@EQUIVARIANT
def test_a_width_that_breaks_equivariance_is_refused(family):
    stride = {"d2_convnext_isotropic": 8, "d2_convnext": 16}[family]
    for make in (
        lambda: create(family)(torch.zeros(1, 3, 64, stride * 3 + stride // 2)),
        lambda: create(family, img_size=(64, stride * 3 + stride // 2)),
    ):
        with pytest.raises(ValueError, match=rf"64 x {stride * 7 // 2} .* stride, {stride}.* 64 x"):
            make()
    with pytest.raises(ValueError, match=rf"height.*{stride} x {stride}"):
        create(family)(torch.zeros(1, 3, stride - 1, stride))
    assert create(family, img_size=(64, stride))(torch.zeros(1, 3, 64, stride)).shape == (1, 10)


def test_the_refusal_has_a_reason(monkeypatch):
    """Without the checks an odd map is downsampled, and equivariance is lost."""
    monkeypatch.setattr(tracing, "check_total_stride", lambda *sizes: None)
    monkeypatch.setattr(tracing, "check_stride", lambda *sizes: None)
    x = images(size=(32, 40))
    model = create_random("d2_convnext")
    assert equivariance_error(model, FLOP, x, image(FLOP), invariant).error > 1e-4


def test_fewer_stages_take_more_widths():
    """Pruned to its first stages, a network downsamples less."""
    features = create("d2_convnext", features_only=True, out_indices=(0, 1))
    assert [tuple(y.shape[1:]) for y in features(torch.zeros(1, 3, 32, 20))] == [
        (16, 16, 10),
        (32, 8, 5),
    ]
    with pytest.raises(ValueError, match="total stride, 4"):
        features(torch.zeros(1, 3, 32, 18))


@EQUIVARIANT
def test_without_pooling_flopping_flips_the_logits(family):
    model = create_random(family, global_pool="")
    x = images(size=(32, 48))
    y = model(x)
    assert y.shape[:2] == (2, 10)
    assert_equivariant(model, FLOP, x, image(FLOP), image(FLOP))
    with pytest.raises(ValueError, match=r"'max'.*use 'avg', or ''"):
        create(family, global_pool="max")


@ALL
def test_options(family):
    model = create(
        family, in_chans=2, num_classes=7, drop_rate=0.2, drop_path_rate=0.4, head_init_scale=0.0
    )
    assert model(torch.randn(3, 2, 32, 32)).tolist() == [[0.0] * 7] * 3
    assert model.head_drop.p == 0.2
    blocks = [m for m in model.modules() if hasattr(m, "dwconv")]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.4 * i / (len(blocks) - 1) for i in range(len(blocks))])
    for unknown in ("use_attn_mixer", "use_fused_attn", "proj_drop_rate", "no_such_option"):
        with pytest.raises(TypeError, match=unknown):
            create(family, **{unknown: True})


@ALL
def test_layer_scale_only_if_positive(family):
    without = create(family, layer_scale_init_value=0.0)
    assert not any("gamma" in key for key in without.state_dict())
    gammas = [
        p for k, p in create(family, layer_scale_init_value=1e-6).named_parameters() if "gamma" in k
    ]
    assert gammas
    assert all(p.eq(1e-6).all() for p in gammas)


def test_default_layer_scale():
    hierarchical = timm.create_model("d2_convnext_tiny", dims=(4, 4, 4, 4))
    assert hierarchical.stages[0][0].gamma.alpha_sym.tolist() == pytest.approx([1e-6] * 2)
    assert timm.create_model("d2_convnext_isotropic_small", embed_dim=4).blocks[0].gamma is None


@ALL
def test_initialisation(family):
    """Convolutions as linear maps: truncated normal, 0.02; no bias."""
    torch.manual_seed(0)
    wide = {"dims": (64, 64, 128, 128)} if family == "d2_convnext" else {"embed_dim": 128}
    model = create(family, **wide)
    kinds = (nn.Linear, nn.Conv2d, MirrorKernel)
    layers = {k: m for k, m in model.named_modules() if isinstance(m, kinds)}
    assert layers
    for name, layer in layers.items():
        if layer.weight.numel() > 500:
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15), name
        assert layer.bias is None or not layer.bias.any(), name


def test_ordinary_twin_has_no_antisymmetric_part():
    model = create("convnext_isotropic")
    assert model.num_features == model.head_hidden_size == 32
    assert {info["symmetric_channels"] for info in model.feature_info} == {None}
    with pytest.raises(ValueError, match="no antisymmetric part"):
        create("convnext_isotropic", use_symmetrized_asym_feats=True)
    # fully convolutional, and of any width
    assert model(torch.zeros(1, 3, 33, 35)).shape == (1, 10)


def test_stages_are_timms():
    """Depths, widths and strides; timm has the ordinary networks under the same names."""
    for size in ("tiny", "small", "base", "large", "xlarge"):
        with torch.device("meta"):
            ours = timm.create_model(f"d2_convnext_{size}")
            theirs = timm.create_model(f"convnext_{size}")
        for key in ("num_chs", "reduction", "module"):
            expected = [info[key] for info in theirs.feature_info]
            assert [info[key] for info in ours.feature_info] == expected
        depths = [len(stage.blocks) for stage in theirs.stages]
        assert [len(stage) for stage in ours.stages] == depths


def test_layer_wise_learning_rates_go_by_depth():
    """Downsampling belongs to the first block behind it, or to its stage."""
    model = create("d2_convnext")  # 1, 1, 2 and 1 blocks
    fine = group_parameters(model, model.group_matcher(), reverse=True)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    depths = {
        "downsample_layers.0.0.proj_sym.weight": (0, 0),
        "stages.0.0.pwconv1.linear_sym.weight": (1, 1),
        "downsample_layers.2.1.sym_to_sym.weight": (3, 3),
        "stages.2.0.pwconv1.linear_sym.weight": (3, 3),
        "stages.2.1.pwconv1.linear_sym.weight": (4, 3),
        "stages.3.0.gamma.alpha_sym": (5, 4),
        "head.weight": (6, 5),
    }
    assert {name: (fine[name], coarse[name]) for name in depths} == depths


@EQUIVARIANT
def test_a_broken_twin_is_found(family):
    """One kernel of one block that is not mirrored."""
    model = create_random(family)
    block = model.stages[2][0] if family == "d2_convnext" else model.blocks[1]
    part = block.dwconv.sym_to_sym
    kernel = torch.randn(part()[0].shape, generator=torch.Generator().manual_seed(0))
    part.forward = lambda: (kernel.double(), part.bias)
    assert equivariance_error(model, FLOP, images(), image(FLOP), invariant).error > 1e-4


def test_the_ordinary_isotropic_network_is_of_the_same_class():
    assert isinstance(create("d2_convnext"), ConvNeXt)
    assert type(create("d2_convnext_isotropic")) is type(create("convnext_isotropic"))
    assert isinstance(create("convnext_isotropic"), IsotropicConvNeXt)
