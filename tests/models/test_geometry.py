"""Networks stay exactly equivariant on every grid, pooling and set of tokens.

All parameters are random and all arithmetic is in float64, so that an error of one sign or one
token shows at 1e-10 of the norm.
"""

import pytest
import torch
from tiny import NAMES, create, create_random, images
from torch import Tensor

from deit.equivariance import equivariance_error, image, invariant, measure, tolerance_of
from deit.groups import FLOP
from deit.layers import Block, MirrorGrid, OrdinaryBlock, RegularBridge

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
TOKENS = ("d2_deit", "d2_inv_early_deit", "resmlp_equi_d2")
# a family, the size of images, options
CASES = [
    *((f, size, dict(img_size=size, patch_size=p)) for f in TOKENS for size, p in GEOMETRIES),
    *(("d2_convnext_isotropic", size, dict(patch_size=p)) for size, p in GEOMETRIES),
    *(("d2_convnext", size, {}) for size in ((32, 32), (48, 80), (80, 48), (35, 64))),
    *((f, (35, 64), dict(use_symmetrized_asym_feats=True))
      for f in ("d2_convnext_isotropic", "d2_convnext")),
    # where nothing is downsampled behind it, an odd map has a column that is its own mirror
    ("d2_convnext_isotropic", (16, 40), dict(global_pool="", num_classes=0)),
    ("d2_convnext", (32, 48), dict(global_pool="")),
    ("resmlp_equi_d2", (32, 32), dict(global_pool="")),
    ("resmlp_equi_d2", (24, 40), dict(img_size=(24, 40), use_symmetrized_asym_feats=True)),
    # the grids of DINOv2 and of large patches, whose odd widths are why there are middle columns
    ("d2_deit", (518, 518), dict(img_size=518, patch_size=14, embed_dim=8, depth=2)),
    ("d2_deit", (224, 224), dict(img_size=224, patch_size=32)),
    *(("d2_deit", (24, 40),
       dict(img_size=(24, 40), class_token=pool == "token", global_pool=pool, reg_tokens=count,
            use_symmetrized_asym_feats=symmetrized))
      for pool in ("token", "avg") for count in (0, 3) for symmetrized in (False, True)),
    ("d2_deit", (24, 40), dict(img_size=(24, 40), global_pool="avg")),
    *((f, (16, 24), dict(img_size=(16, 24), global_pool="", num_classes=count))
      for f in ("d2_deit", "d2_inv_early_deit") for count in (0, 10)),
    ("hybrid_deit", (32, 40), dict(img_size=(32, 40))),
    *(("d2_deit", size, dict(img_size=made, dynamic_img_size=True))
      for made in (32, (24, 40)) for size in ((32, 32), (40, 40), (24, 56), (72, 16))),
]  # fmt: skip


def on_map(symmetric: int):
    """Flopping of (B, C, H, W) maps in image order whose first channels are symmetric."""

    def act(g: int, x: Tensor) -> Tensor:
        s, a = x[:, :symmetric], x[:, symmetric:]
        return torch.cat([s, -a], 1).flip(-1) if g else x

    return act


def on_logits(model):
    """Pooled logits are left alone; without pooling places move, but where they are rows of
    decomposed tokens, or lie before those of the grid."""
    if model.global_pool or hasattr(model, "tokens"):
        return invariant
    if not hasattr(model, "patch_embed"):
        return image(FLOP)
    prefix = model.num_prefix_tokens

    def act(g: int, x: Tensor) -> Tensor:
        grid = x[:, prefix:].unflatten(1, model.patch_embed.grid_size)
        return torch.cat([x[:, :prefix], grid.flip(2).flatten(1, 2)], 1) if g else x

    return act


@torch.no_grad()
def assert_network_equivariant(model, x: Tensor) -> None:
    """The logits, and the maps after every block up to a bridge that gives equivariance up."""
    maps, flopped = (
        model.forward_intermediates(y, intermediates_only=True) for y in (x, x.flip(-1))
    )
    symmetric = [info["symmetric_channels"] for info in model.feature_info]
    compared = [
        (before, after, on_map(count))
        for before, after, count in zip(maps, flopped, symmetric, strict=True)
        if count is not None
    ]
    if symmetric[-1] is not None and not isinstance(getattr(model, "bridge", None), RegularBridge):
        compared.append((model(x), model(x.flip(-1)), on_logits(model)))
    for before, after, act in compared:
        assert measure([before, after], act).problem(tolerance_of(x.dtype)) is None


@pytest.mark.parametrize(("family", "size", "options"), CASES, ids=str)
def test_equivariance(family, size, options):
    assert_network_equivariant(create_random(family, **options), images(size=size))


@pytest.mark.parametrize("layer", [None, *range(5)])
def test_a_bridge_gives_equivariance_up_or_makes_features_invariant(layer):
    """After `break_layer` blocks, by default half of them. Norm and classifier of a hybrid are
    ordinary ones; the other family is invariant to the end."""
    options, before = ({}, 2) if layer is None else ({"break_layer": layer}, layer)
    for family, after in (("hybrid_deit", None), ("d2_inv_early_deit", 32)):
        model = create_random(family, **options)
        assert [type(block) for block in model.blocks] == (
            [Block] * before + [OrdinaryBlock] * (4 - before)
        )
        symmetric = [info["symmetric_channels"] for info in model.feature_info]
        assert symmetric == [16] * before + [after] * (4 - before)
        assert_network_equivariant(model, images())
        error = equivariance_error(model, FLOP, images(), image(FLOP), invariant).error
        assert error > 1e-3 if family == "hybrid_deit" else error < 1e-10


# images of other sizes


@pytest.mark.parametrize("size", [(40, 40), (24, 56), (72, 16)])
def test_a_resized_network_gives_what_a_dynamic_one_gives(size):
    dynamic, resized = create_random("d2_deit", dynamic_img_size=True), create_random("d2_deit")
    resized.set_input_size(img_size=size)
    x = images(size=size)
    torch.testing.assert_close(resized(x), dynamic(x))
    assert_network_equivariant(resized, x)
    order = MirrorGrid(size[0] // 8, size[1] // 8).permutation()
    assert torch.equal(resized.patch_embed.flatten_and_permute.permutation, order)


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
    with pytest.raises(ValueError, match="patch_size must be at least 1"):
        model.set_input_size(patch_size=0)
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match="avgmax"):
        model.reset_classifier(10, "avgmax")
    with pytest.raises(ValueError, match="num_classes must be at least 0"):
        model.reset_classifier(-1)
    assert model.num_classes == model.head.out_features


# what is no image, and options that make no network


@pytest.mark.parametrize("family", NAMES)
def test_what_is_no_image_is_refused_with_its_shape(family):
    model = create(family)
    for shape in ((3, 32, 32), (2, 1, 32, 32), (2, 3, 32)):
        with pytest.raises(ValueError, match=r"\(batch, 3, height, width\), not.*32"):
            model(torch.zeros(shape))


@pytest.mark.parametrize("family", NAMES)
def test_sizes_that_make_no_network_are_refused(family):
    wrong = {"in_chans": 0, "img_size": "32", "patch_size": (4, 0), "num_classes": -1}
    if family == "d2_convnext":
        wrong |= {"depths": (1, 0, 1, 1), "dims": (4, 4, 4, 0)}
    else:
        wrong |= {"depth": 0, "embed_dim": 0}
    for size, value in wrong.items():
        with pytest.raises(ValueError, match=f"{size} must be at least .*, not .*['0-]"):
            create(family, **{size: value})


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        *(("d2_deit", dict(global_pool=pool), f"{pool}.*use 'token', 'avg', or ''")
          for pool in ("max", "avgmax", "map")),
        ("d2_deit", dict(class_token=False), "needs class_token=True"),
        ("resmlp_equi_d2", dict(global_pool="token"), "'token'.*use 'avg', or ''"),
        ("d2_convnext", dict(global_pool="max"), "'max'.*use 'avg', or ''"),
        ("d2_convnext", dict(depths=()), r"depths \(\) and dims.*equally many"),
        ("convnext_isotropic", dict(use_symmetrized_asym_feats=True), "no antisymmetric part"),
        ("hybrid_deit", dict(use_symmetrized_asym_feats=True), "no antisymmetric part"),
        ("d2_deit", dict(bridge="x"), "bridge 'x' is not known: use regular, invariant or None"),
        ("d2_deit", dict(break_layer=2), "this network has none"),
        ("hybrid_deit", dict(break_layer=5), "break_layer 5 is not among the 4 blocks"),
        ("resmlp_equi_d2", dict(img_size=33), "33 pixels cannot be cut into patches of 8 x 8"),
        ("resmlp", dict(nlhb=True), "nlhb"),
        ("d2_convnext_isotropic", dict(img_size=(64, 28)), "64 x 28 .* stride, 8.* 64 x"),
        ("d2_convnext", dict(img_size=(64, 56)), "64 x 56 .* stride, 16.* 64 x"),
    ],
)  # fmt: skip
def test_options_that_make_no_network_are_refused(family, options, message):
    with pytest.raises(ValueError, match=message):
        create(family, **options)


@pytest.mark.parametrize(
    ("family", "options", "size", "message"),
    [
        ("d2_deit", {}, (40, 40), r"40 x 40 pixels.*made for 32 x 32.*dynamic_img_size"),
        ("d2_deit", dict(dynamic_img_size=True), (36, 32), "cannot be cut into patches"),
        ("resmlp_equi_d2", {}, (32, 40), "images are 32 x 40 pixels.*made for 32 x 32"),
        ("d2_convnext_isotropic", {}, (64, 28), "64 x 28 .* stride, 8.* 64 x"),
        ("d2_convnext", {}, (64, 56), "64 x 56 .* stride, 16.* 64 x"),
        ("d2_convnext_isotropic", {}, (7, 8), "height.*8 x 8"),
        ("d2_convnext", {}, (15, 16), "height.*16 x 16"),
    ],
)
def test_images_of_sizes_that_do_not_fit_are_refused(family, options, size, message):
    with pytest.raises(ValueError, match=message):
        create(family, **options)(torch.zeros(1, 3, *size))
