"""What a family does that the others do not: initial values, stages, options."""

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import group_parameters
from tiny import NAMES, TRANSFORMERS, create
from torch import Tensor


def test_ordinary_convnext():
    """No antisymmetric part; fully convolutional, and of any width."""
    model = create("convnext_isotropic")
    assert model.num_features == model.head_hidden_size == 32
    assert {info["symmetric_channels"] for info in model.feature_info} == {None}
    assert model(torch.zeros(1, 3, 33, 35)).shape == (1, 10)


def test_fewer_stages_take_more_widths():
    """Pruned to its first stages, a network downsamples less."""
    features = create("d2_convnext", features_only=True, out_indices=(0, 1))
    shapes = [tuple(y.shape[1:]) for y in features(torch.zeros(1, 3, 32, 20))]
    assert shapes == [(16, 16, 10), (32, 8, 5)]
    with pytest.raises(ValueError, match="total stride, 4"):
        features(torch.zeros(1, 3, 32, 18))


def test_layer_wise_learning_rates_of_a_convnext_go_by_depth():
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


CONVNEXTS = ("d2_convnext_isotropic", "d2_convnext", "convnext_isotropic")


@pytest.mark.parametrize("family", NAMES)
def test_options(family):
    """Stochastic depth rises with depth in ConvNeXt, and is constant in the others."""
    rates = dict(drop_rate=0.2, drop_path_rate=0.4)
    if family not in CONVNEXTS:
        rates["proj_drop_rate"] = 0.3
    if family in TRANSFORMERS:
        rates |= dict(pos_drop_rate=0.25, attn_drop_rate=0.1)
    model = create(family, in_chans=2, num_classes=7, head_init_scale=0.0, **rates)
    assert model(torch.randn(3, 2, 32, 32)).tolist() == [[0.0] * 7] * 3
    assert model.head_drop.p == 0.2
    found = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    if family in CONVNEXTS:  # four blocks, or five; an ordinary first one has none
        count = len([m for m in model.modules() if hasattr(m, "dwconv")])
        expected = [0.4 * i / (count - 1) for i in range(count)]
        assert found == pytest.approx(expected[-len(found) :])
        assert len(found) >= count - 1
    else:
        assert set(found) == {0.4}
        assert {rate for b in model.blocks for rate in (b.mlp.drop1.p, b.mlp.drop2.p)} == {0.3}
    if family in TRANSFORMERS:
        assert model.pos_drop.p == 0.25
        attentions = [block.attn for block in model.blocks]
        assert {(a.attn_drop.p, a.proj_drop.p) for a in attentions} == {(0.1, 0.3)}
        for fused in (True, False):
            other = create(family, use_fused_attn=fused, qkv_bias=False)
            assert {block.attn.fused_attn for block in other.blocks} == {fused}
            assert [n for n, _ in other.named_parameters() if "qkv" in n and "bias" in n] == []
        return
    for unknown in ("use_attn_mixer", "use_fused_attn", "attn_drop_rate"):
        with pytest.raises(TypeError, match=unknown):
            create(family, **{unknown: True})


# initial values


def parameters_of(family: str, **kwargs) -> dict[str, Tensor]:
    torch.manual_seed(0)
    options = dict(embed_dim=256, num_heads=4) if "deit" in family else dict(embed_dim=256)
    if family == "d2_convnext":
        options = dict(dims=(64, 64, 128, 256))
    model = create(family, **{"num_classes": 200, **options, **kwargs})
    return dict(model.named_parameters())


@pytest.mark.parametrize("family", NAMES)
def test_the_published_rule(family):
    """Truncated normal, 0.02, for linear maps and ConvNeXt's convolutions; kernels of patches and
    their bias as torch draws them, with the fan-in of the stored half; no other bias."""
    of_convnext, bound = "convnext" in family, (3 * 8 * 4) ** -0.5
    for name, parameter in parameters_of(family).items():
        is_patch = name.startswith("patch_embed")
        is_matrix = name.endswith("weight") and parameter.ndim > 1
        if name.startswith("patch_embed.proj_"):
            assert 0.95 * bound < parameter.abs().max() <= bound, name
            assert abs(parameter.std() / (bound / 3**0.5) - 1) < 0.1, name
        elif is_matrix and (not is_patch or of_convnext) and parameter.numel() > 500:
            tolerance = 0.1 if parameter.numel() > 2000 else 0.15
            assert abs(parameter.std() / 0.02 - 1) < tolerance, name
            assert abs(parameter.mean()) < 0.005, name
        elif name.endswith("bias") and not is_patch:
            assert not parameter.any(), name
        elif "alpha" in name and "gamma" not in name:
            assert (parameter == 1).all(), name
        elif "beta" in name:
            assert not parameter.any(), name
        elif name.startswith(("pos_embed", "cls_token")):
            assert abs(parameter.std() / 0.02 - 1) < 0.2, name


SCALES = ("init_scale", "init_values", "layer_scale_init_value")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((f"{family}_small_patch16_LS", 1e-4) for family in ("d2_deit", "hybrid_deit", "deit")),
        *(("resmlp_" + size, value) for size, value in (("12", 0.1), ("24", 1e-5), ("36", 1e-6))),
        *((f"resmlp_equi_d2_{size}", value) for size, value in (("12", 0.1), ("24", 1e-5))),
        *((f"resmlp_equi_d2_{size}_24", 1e-6) for size in "BL"),
        *((f"resmlp{size}_24", 1e-6) for size in "BL"),
        ("d2_convnext_tiny", 1e-6),
        ("d2_convnext_isotropic_small", None),
        ("convnext_isotropic_small", None),
    ],
)
def test_layer_scale(name, value):
    """The default, and under each of its names; none unless it is positive."""
    sizes = dict(dims=(8,) * 4) if name == "d2_convnext_tiny" else dict(embed_dim=24, depth=2)

    def gammas(**kwargs):
        found = timm.create_model(name, **sizes, **kwargs).named_parameters()
        return [p for n, p in found if "gamma" in n]

    assert (value is None) == (gammas() == [])
    assert all((p == torch.tensor(value)).all() for p in gammas())
    for argument in SCALES:
        assert all((p == 0.5).all() for p in gammas(**{argument: 0.5}))
        assert gammas(**{argument: 0.5})
    if "convnext" in name:
        assert gammas(layer_scale_init_value=0.0) == []


@pytest.mark.parametrize("family", ["d2_deit", "deit", "resmlp_equi_d2", "d2_convnext_isotropic"])
def test_head_init_scale(family):
    plain, scaled = parameters_of(family), parameters_of(family, head_init_scale=0.25)
    torch.testing.assert_close(scaled["head.weight"], plain["head.weight"] * 0.25)
    other = next(n for n in plain if n != "head.weight" and plain[n].ndim > 1)
    assert torch.equal(scaled[other], plain[other])
