"""What a family does that the others do not: heads, stages, the order of tokens, options."""

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import group_parameters
from tiny import NAMES, TRANSFORMERS, create

from deit.layers import MirrorGrid


@pytest.mark.parametrize(
    ("size", "names"),
    [((32, 32), ["left_idx", "right_idx"]), ((32, 40), ["left_idx", "middle_idx", "right_idx"])],
)
def test_token_order_of_a_resmlp_is_stored_as_published(size, names):
    state = create("resmlp_equi_d2", img_size=size).state_dict()
    prefix = "patch_embed.flatten_and_permute_to_fourier."
    stored = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    assert list(stored) == names
    order = MirrorGrid(size[0] // 8, size[1] // 8).permutation()
    assert torch.equal(torch.cat(list(stored.values())), order)


def test_ordinary_convnext():
    """No antisymmetric part; fully convolutional, and of any width."""
    model = create("convnext_isotropic")
    assert model.num_features == model.head_hidden_size == 32
    assert {info["symmetric_channels"] for info in model.feature_info} == {None}
    assert model(torch.zeros(1, 3, 33, 35)).shape == (1, 10)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "xlarge"])
def test_stages_are_timms(size):
    """Depths, widths and strides; timm has the ordinary networks under the same names."""
    with torch.device("meta"):
        ours = timm.create_model(f"d2_convnext_{size}")
        theirs = timm.create_model(f"convnext_{size}")
    for mine, info in zip(ours.feature_info, theirs.feature_info, strict=True):
        assert {key: mine[key] for key in info} == info
    assert [len(stage) for stage in ours.stages] == [len(s.blocks) for s in theirs.stages]


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
