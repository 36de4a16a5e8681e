"""ResMLP: tokens and channels decomposed alike."""

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, checkpoint_filter_fn
from tiny import create, create_random, images

from deit.equivariance import assert_equivariant, equivariance_error, image, invariant
from deit.groups import FLOP
from deit.layers import Linear, MirrorGrid, MirrorHalves, MixerBlock
from deit.models import OrdinaryResMLP, ResMLP


@pytest.mark.parametrize("symmetrized", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_head_formula(size, symmetrized):
    """The table: ss and aa along tokens, |sa| and |as| along channels, Affine, mean over tokens."""
    model = create_random("resmlp_equi_d2", img_size=size, use_symmetrized_asym_feats=symmetrized)
    x = images(size=size)
    (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
    # from the map to tokens and their mirror images, by pixels
    width = last.shape[-1]
    left, right = last[..., : width // 2], last.flip(-1)[..., : width // 2]
    symmetric, antisymmetric = (left + right) / 2**0.5, (left - right) / 2**0.5
    if width % 2:  # a middle column is symmetric as it is
        symmetric = torch.cat([symmetric, last[..., width // 2, None]], -1)
    (ss, as_), (sa, aa) = symmetric.chunk(2, 1), antisymmetric.chunk(2, 1)
    features = torch.cat([ss.flatten(2), aa.flatten(2)], 2)
    if symmetrized:
        others = torch.cat([sa.flatten(2), as_.flatten(2)], 2).abs()
        features = torch.cat([features, others], 1)
    normed = model.norm.alpha * features.mT + model.norm.beta
    expected = normed.mean(1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected)
    assert model.num_features == model.head_hidden_size == (32 if symmetrized else 16)


def test_tokens_and_channels_use_one_layer():
    block = create("resmlp_equi_d2").blocks[0]
    assert type(block.attn) is type(block.mlp.fc1) is Linear
    assert block.attn.in_rep == MirrorGrid(4, 4).rep
    assert block.mlp.fc1.in_rep == FLOP.regular(32)


@pytest.mark.parametrize(
    ("size", "names"),
    [((32, 32), ["left_idx", "right_idx"]), ((32, 40), ["left_idx", "middle_idx", "right_idx"])],
)
def test_token_order_is_stored_as_published(size, names):
    state = create("resmlp_equi_d2", img_size=size).state_dict()
    prefix = "patch_embed.flatten_and_permute_to_fourier."
    stored = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    assert list(stored) == names
    order = MirrorGrid(size[0] // 8, size[1] // 8).permutation()
    assert torch.equal(torch.cat(list(stored.values())), order)


def test_a_checkpoint_of_another_order_is_refused():
    model = create("resmlp_equi_d2", img_size=(16, 64))
    other = create("resmlp_equi_d2", img_size=(64, 16)).state_dict()
    with pytest.raises(RuntimeError, match="token order of a 2 x 8 grid"):
        model.load_state_dict(other)


def test_published_shifts_start_at_zero_and_can_be_trained():
    model = create("resmlp_equi_d2")
    betas = {k: p for k, p in model.named_parameters() if "beta_" in k}
    assert len(betas) == 4 * 2 * 2
    assert not any(p.any() for p in betas.values())
    model(images().float()).sum().backward()
    assert all(p.grad.any() for p in betas.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [("12", 0.1), ("24", 1e-5), ("B_24", 1e-6), ("L_24", 1e-6)],
)
def test_initial_layer_scale(name, value):
    small = dict(img_size=32, embed_dim=8, depth=2)
    model = timm.create_model(f"resmlp_equi_d2_{name}", **small)
    assert model.blocks[1].gamma_2.alpha_asym.tolist() == pytest.approx([value] * 4)
    plain = "resmlp_" + name if name.isdigit() else f"resmlp{name}"
    ordinary = timm.create_model(plain, **small)
    assert ordinary.blocks[1].gamma_2.tolist() == pytest.approx([value] * 8)
    # users may give it under any of its names
    given = timm.create_model("resmlp_equi_d2_12", layer_scale_init_value=0.5, **small)
    assert given.blocks[0].gamma_1.alpha_sym.tolist() == [0.5] * 4


@pytest.mark.parametrize("family", ["resmlp_equi_d2", "resmlp"])
def test_options(family):
    model = create(
        family,
        in_chans=2,
        num_classes=7,
        drop_rate=0.2,
        proj_drop_rate=0.3,
        drop_path_rate=0.4,
        head_init_scale=0.0,
    )
    assert model(torch.randn(3, 2, 32, 32)).tolist() == [[0.0] * 7] * 3
    assert model.head_drop.p == 0.2
    rates = {m.drop_prob for m in model.modules() if isinstance(m, DropPath)}
    assert rates == {0.4}  # constant over depth
    mlp = model.blocks[0].mlp
    assert mlp.drop1.p == mlp.drop2.p == 0.3
    for unknown in ("attn_drop_rate", "use_attn_mixer", "use_fused_attn", "no_such_option"):
        with pytest.raises(TypeError, match=unknown):
            create(family, **{unknown: True})


def test_a_network_takes_images_of_its_size_alone():
    with pytest.raises(ValueError, match=r"images are 32 x 40 pixels.*made for 32 x 32"):
        create("resmlp_equi_d2")(torch.zeros(1, 3, 32, 40))
    with pytest.raises(ValueError, match="33 pixels cannot be cut into patches of 8 x 8"):
        create("resmlp_equi_d2", img_size=33)


def test_without_pooling_the_rows_are_invariant():
    model = create_random("resmlp_equi_d2", global_pool="")
    assert_equivariant(model, FLOP, images(), image(FLOP), invariant)
    assert model(images()).shape == (2, 16, 10)
    with pytest.raises(ValueError, match=r"'token'.*use 'avg', or ''"):
        create("resmlp_equi_d2", global_pool="token")


def test_initialisation():
    torch.manual_seed(0)
    for family in ("resmlp_equi_d2", "resmlp"):
        model = create(family, embed_dim=256, img_size=64)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and not name.startswith("patch_embed"):
                assert not parameter.any(), name
            elif "fc" in name or name.startswith("head"):
                assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_a_broken_twin_is_found():
    """Tokens in the wrong order: everything else of the network is right."""
    model = create_random("resmlp_equi_d2")
    order = model.patch_embed.grid.permutation().argsort()

    def row_major(module, args, output):
        return tuple(part[:, order] for part in output)

    model.patch_embed.register_forward_hook(row_major)
    assert equivariance_error(model, FLOP, images(), image(FLOP), invariant).error > 1e-3


def test_the_ordinary_network_is_timms():
    """timm's MlpMixer underneath; the published weights give what timm gives for them."""
    model = create_random("resmlp")
    assert isinstance(model, OrdinaryResMLP)
    assert isinstance(model, MlpMixer)
    theirs = MlpMixer(
        10,
        img_size=32,
        patch_size=8,
        embed_dim=32,
        num_blocks=4,
        mlp_ratio=4,
        block_layer=ResBlock,
        norm_layer=Affine,
    )
    state = checkpoint_filter_fn(model.state_dict(), theirs)
    theirs.double().eval().load_state_dict(state)
    torch.testing.assert_close(model(images()), theirs(images()))
    with pytest.raises(ValueError, match="nlhb"):
        create("resmlp", nlhb=True)


def test_built_of_the_layers():
    model = create("resmlp_equi_d2")
    assert isinstance(model, ResMLP)
    assert all(isinstance(block, MixerBlock) for block in model.blocks)
    assert isinstance(model.patch_embed.flatten_and_permute_to_fourier, MirrorHalves)
    assert model.patch_embed.scale == 1.0
