"""Networks stay exactly equivariant on every grid, pooling and set of tokens.

All parameters are random and all arithmetic is in float64, so that an error of one sign or one
token shows at 1e-10 of the norm.
"""

import pytest
import timm
import torch
from tiny import (
    EQUIVARIANT_TRANSFORMERS,
    FAMILIES,
    INVARIANT,
    NAMES,
    create,
    create_random,
    images,
)
from torch import Tensor

from deit.equivariance import assert_equivariant, equivariance_error, image, invariant
from deit.groups import FLOP
from deit.layers import MirrorGrid
from deit.models.vit import checkpoint_filter_fn

# (img_size, patch_size): even and odd grids, square and not, patches square and not, of odd width
GEOMETRIES = [
    ((32, 32), 8),
    ((70, 70), 10),
    ((24, 56), 8),
    ((56, 24), 8),
    ((32, 40), (16, 8)),
    ((21, 28), 7),
    ((32, 8), 8),
]


def on_map(symmetric: int | None):
    """Flopping of (B, C, H, W) maps in image order whose first channels are symmetric."""

    def act(g: int, x: Tensor) -> Tensor:
        if not g:
            return x
        signs = torch.ones(x.shape[1], dtype=x.dtype)
        signs[symmetric:] = -1
        return x.flip(-1) * signs[:, None, None]

    return act


def assert_network_equivariant(model, x: Tensor) -> None:
    """The logits, and the maps after every block up to a bridge that gives equivariance up."""
    if model.num_classes > 0 and getattr(model, "bridge_keeps_equivariance", True):
        assert_equivariant(model, FLOP, x, image(FLOP), invariant)
    for i, info in enumerate(model.feature_info):
        if info["symmetric_channels"] is None:
            continue

        def feature_map(y: Tensor, i: int = i) -> Tensor:
            (z,) = model.forward_intermediates(y, indices=[i], intermediates_only=True)
            return z

        assert_equivariant(feature_map, FLOP, x, image(FLOP), on_map(info["symmetric_channels"]))


@pytest.mark.parametrize(("img_size", "patch_size"), GEOMETRIES)
@pytest.mark.parametrize("family", ["d2_deit", "d2_inv_early_deit", "resmlp_equi_d2"])
def test_every_grid(family, img_size, patch_size):
    model = create_random(family, img_size=img_size, patch_size=patch_size)
    assert_network_equivariant(model, images(size=img_size))


@pytest.mark.parametrize(("img_size", "patch_size"), GEOMETRIES)
def test_every_grid_of_an_isotropic_convnext(img_size, patch_size):
    model = create_random("d2_convnext_isotropic", patch_size=patch_size)
    assert_network_equivariant(model, images(size=img_size))


@pytest.mark.parametrize("size", [(32, 32), (48, 80), (80, 48)])
def test_every_grid_of_a_hierarchical_convnext(size):
    assert_network_equivariant(create_random("d2_convnext"), images(size=size))


def test_the_grids_that_motivate_odd_widths():
    dinov2 = create_random("d2_deit", img_size=518, patch_size=14, embed_dim=8, depth=2)
    assert dinov2.patch_embed.grid_size == (37, 37)
    assert_network_equivariant(dinov2, images(size=(518, 518)))
    wide = create_random("d2_deit", img_size=224, patch_size=32)
    assert wide.patch_embed.grid_size == (7, 7)
    assert_network_equivariant(wide, images(size=(224, 224)))


@pytest.mark.parametrize("symmetrized", [False, True])
@pytest.mark.parametrize("reg_tokens", [0, 3])
@pytest.mark.parametrize(
    ("class_token", "global_pool"), [(True, "token"), (True, "avg"), (False, "avg")]
)
def test_every_pooling_and_prefix(class_token, global_pool, reg_tokens, symmetrized):
    model = create_random(
        "d2_deit",
        img_size=(24, 40),
        class_token=class_token,
        global_pool=global_pool,
        reg_tokens=reg_tokens,
        use_symmetrized_asym_feats=symmetrized,
    )
    assert model.num_prefix_tokens == class_token + reg_tokens
    assert_network_equivariant(model, images(size=(24, 40)))


@pytest.mark.parametrize("num_classes", [0, 10])
@pytest.mark.parametrize("family", ["d2_deit", "d2_inv_early_deit"])
def test_without_pooling_flopping_flips_the_tokens(family, num_classes):
    model = create_random(family, img_size=(16, 24), global_pool="", num_classes=num_classes)
    x = images(size=(16, 24))
    y, flopped = model(x), model(x.flip(-1))
    assert y.shape == (2, 1 + 2 * 3, num_classes or model.num_features)
    torch.testing.assert_close(flopped[:, 0], y[:, 0])
    grid = y[:, 1:].unflatten(1, (2, 3))
    torch.testing.assert_close(flopped[:, 1:].unflatten(1, (2, 3)), grid.flip(2))
    assert not torch.allclose(grid, grid.flip(2))


@pytest.mark.parametrize("pool", ["max", "avgmax", "map"])
def test_a_pooling_that_is_not_equivariant_is_refused(pool):
    with pytest.raises(ValueError, match=f"{pool}.*use 'token', 'avg', or ''"):
        create("d2_deit", global_pool=pool)
    with pytest.raises(ValueError, match=pool):
        create("d2_deit").reset_classifier(10, pool)
    with pytest.raises(ValueError, match="needs class_token=True"):
        create("d2_deit", class_token=False)


def test_a_hybrid_is_equivariant_up_to_its_bridge_alone():
    model = create_random("hybrid_deit")
    symmetric = [info["symmetric_channels"] for info in model.feature_info]
    assert symmetric == [16, 16, None, None]
    x = images()
    assert equivariance_error(model, FLOP, x, image(FLOP), invariant).error > 1e-3
    model.bridge_keeps_equivariance = False
    assert_network_equivariant(model, x)


def test_an_invariant_early_network_is_invariant_to_the_end():
    model = create_random("d2_inv_early_deit")
    assert [info["symmetric_channels"] for info in model.feature_info] == [16, 16, 32, 32]
    assert_network_equivariant(model, images())


@pytest.mark.parametrize("family", INVARIANT)
def test_a_broken_twin_is_found(family):
    """The check is not vacuous: an asymmetric image statistic anywhere in the network shows."""
    model = create_random(family)
    block = "stages.0.0" if family == "d2_convnext" else "blocks.0"

    def break_it(module, args, output):
        s, a = output
        return s, a + 1e-3 * torch.linspace(0, 1, a[0].numel()).double().view_as(a[0])

    model.get_submodule(block).register_forward_hook(break_it)
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(model, FLOP, images(), image(FLOP), invariant)


# images of other sizes


@pytest.mark.parametrize("size", [(32, 32), (40, 40), (24, 56), (72, 16)])
@pytest.mark.parametrize("constructed", [32, (24, 40)])
def test_dynamic_images(constructed, size):
    model = create_random("d2_deit", img_size=constructed, dynamic_img_size=True)
    assert_network_equivariant(model, images(size=size))


@pytest.mark.parametrize("size", [(32, 32), (40, 40), (24, 56), (72, 16)])
def test_a_resized_network_gives_what_a_dynamic_one_gives(size):
    dynamic = create_random("d2_deit", dynamic_img_size=True)
    resized = create_random("d2_deit")
    resized.set_input_size(img_size=size)
    x = images(size=size)
    torch.testing.assert_close(resized(x), dynamic(x))
    assert_network_equivariant(resized, x)
    assert resized.patch_embed.flatten_and_permute.permutation.tolist() == (
        MirrorGrid(size[0] // 8, size[1] // 8).permutation().tolist()
    )


@pytest.mark.parametrize("patch_size", [4, 5, (8, 4), 16])
def test_resized_patches(patch_size):
    model = create_random("d2_deit", img_size=80)
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    model.set_input_size(img_size=(80, 60 // width * width), patch_size=patch_size)
    assert model.feature_info[0]["reduction"] == max(height, width)
    assert_network_equivariant(model, images(size=model.patch_embed.img_size))


def test_resized_patches_see_resized_images_alike():
    """What the resampling is for: half the pixels, half the patch, nearly the same tokens."""
    model = create_random("d2_deit", img_size=64, patch_size=16)
    coarse = images(size=(16, 16))
    large = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    small = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")
    expected = torch.cat(model.patch_embed(large), -1)
    model.set_input_size(img_size=32, patch_size=8)
    actual = torch.cat(model.patch_embed(small), -1)
    # interpolation is not exact; other kernels would be off by more than the norm itself
    assert (actual - expected).norm() < 0.2 * expected.norm()


def test_impossible_sizes_are_refused_and_change_nothing():
    model = create_random("d2_deit")
    x = images()
    before = model(x)
    with pytest.raises(ValueError, match=r"30 x 30.*patches of 8 x 8.*32 x 32"):
        model.set_input_size(img_size=30)
    with pytest.raises(ValueError, match="patches of 7 x 7"):
        model.set_input_size(patch_size=7)
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match=r"40 x 40 pixels.*made for 32 x 32.*dynamic_img_size"):
        model(images(size=(40, 40)))
    dynamic = create("d2_deit", dynamic_img_size=True)
    with pytest.raises(ValueError, match="cannot be cut into patches"):
        dynamic(images(size=(36, 32), dtype=torch.float32))


# checkpoints of other sizes


def embedding_image(model) -> Tensor:
    """The position embedding as an ordinary image, (1, C, H, W)."""
    grid = model.pos_embed.grid
    return grid.to_image_order(torch.cat(model.pos_embed(), -1)).permute(0, 3, 1, 2)


def smooth_(model) -> None:
    """A smooth position embedding of the right symmetry, as a function of the place alone."""
    grid = model.pos_embed.grid
    y = (torch.arange(grid.height).double() + 0.5) / grid.height
    x = (torch.arange(grid.width).double() + 0.5) / grid.width
    width = torch.arange(1, 17).double() / 16
    y, x = torch.meshgrid(y, x, indexing="ij")
    even = torch.cos(torch.pi * (x - 0.5))[..., None] * torch.cos(y[..., None] * width)
    odd = torch.sin(torch.pi * (x - 0.5))[..., None] * torch.cos(y[..., None] * width)
    tokens = grid.to_mirror_order(torch.cat([even, odd], -1)[None])
    with torch.no_grad():
        sym, asym = model.pos_embed.get_parameter("0"), model.pos_embed.get_parameter("1")
        sym.copy_(tokens[:, : sym.shape[1], :16])
        asym.copy_(tokens[:, : asym.shape[1], 16:])


@pytest.mark.parametrize(
    ("old", "new"),
    [((64, 64), (96, 96)), ((64, 64), (88, 88)), ((88, 88), (64, 64)), ((88, 40), (56, 64))],
    ids=["even to even", "even to odd", "odd to even", "not square"],
)
def test_fine_tuning_at_another_size(tmp_path, old, new):
    source = create_random("d2_deit", img_size=old)
    smooth_(source)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    name, tiny = FAMILIES["d2_deit"]
    model = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth"), num_classes=10),
        **{**tiny, "img_size": new, "num_classes": 10},
    )
    model.double().eval()
    # weights went through float32, the parameters' dtype at creation
    torch.testing.assert_close(model.head.weight, source.head.weight, rtol=1e-6, atol=1e-6)
    assert_network_equivariant(model, images(size=new))
    target = create("d2_deit", img_size=new).double()
    smooth_(target)
    expected = embedding_image(target)
    assert (embedding_image(model) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("family", EQUIVARIANT_TRANSFORMERS)
def test_another_token_order_is_an_error_that_says_why(family):
    model = create(family)
    state = model.state_dict()
    key = "patch_embed.flatten_and_permute.permutation"
    state[key] = state[key].roll(1)
    with pytest.raises(RuntimeError, match=f"{key} .* is not the token order of a 4 x 4 grid"):
        model.load_state_dict(state)
    state = create(family, img_size=64).state_dict()
    with pytest.raises(RuntimeError, match="is not the token order of a 4 x 4 grid"):
        model.load_state_dict(state)


@pytest.mark.parametrize("family", EQUIVARIANT_TRANSFORMERS)
def test_an_antisymmetric_class_token_is_an_error_that_says_why(family):
    model = create(family)
    state = model.state_dict()
    state["cls_token.1"] = torch.full_like(state["cls_token.1"], 1e-3)
    with pytest.raises(RuntimeError, match=r"cls_token\.1 .* is not zero, as equivariance demands"):
        model.load_state_dict(state)


def test_an_order_that_is_no_grid_cannot_be_resized():
    model = create("d2_deit", img_size=48)
    state = create("d2_deit").state_dict()
    key = "patch_embed.flatten_and_permute.permutation"
    state[key] = state[key].roll(1)
    with pytest.raises(ValueError, match="not that of any grid"):
        checkpoint_filter_fn(state, model)


# what is no image, and sizes that make no network


@pytest.mark.parametrize("family", NAMES)
def test_what_is_no_image_is_refused_with_its_shape(family):
    model = create(family)
    for shape in ((3, 32, 32), (2, 1, 32, 32), (2, 3, 32)):
        with pytest.raises(ValueError, match=r"\(batch, 3, height, width\), not.*32"):
            model(torch.zeros(shape))


@pytest.mark.parametrize("family", NAMES)
def test_sizes_that_make_no_network_are_refused(family):
    stages = family == "d2_convnext"
    for size in ("in_chans", *(() if stages else ("depth", "embed_dim"))):
        with pytest.raises(ValueError, match=f"{size} must be at least 1, not 0"):
            create(family, **{size: 0})
    with pytest.raises(ValueError, match=r"patch_size must be at least 1, not .*0"):
        create(family, patch_size=(4, 0))
    with pytest.raises(ValueError, match="num_classes must be at least 0, not -1"):
        create(family, num_classes=-1)
    if stages:
        with pytest.raises(ValueError, match=r"depths \(\) and dims.*equally many"):
            create(family, depths=())
        with pytest.raises(ValueError, match=r"depths must be at least 1, not \(1, 0"):
            create(family, depths=(1, 0, 1, 1))
