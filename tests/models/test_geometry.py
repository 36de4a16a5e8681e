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

from deit.equivariance import (
    assert_equivariant,
    equivariance_error,
    image,
    invariant,
    measure,
    tolerance_of,
)
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
    with pytest.raises(ValueError, match="avgmax"):
        model.reset_classifier(10, "avgmax")


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


@pytest.mark.parametrize("family", [*EQUIVARIANT_TRANSFORMERS, "resmlp_equi_d2"])
def test_weights_of_another_geometry_are_an_error_that_says_why(family):
    # in a ResMLP of as many tokens, the order alone is another
    size = (16, 64) if family == "resmlp_equi_d2" else 64
    state = create(family, img_size=size).state_dict()
    with pytest.raises(RuntimeError, match="is not the token order of a 4 x 4 grid"):
        create(family).load_state_dict(state)


# what is no image, and sizes that make no network


@pytest.mark.parametrize("family", NAMES)
def test_what_is_no_image_is_refused_with_its_shape(family):
    model = create(family)
    for shape in ((3, 32, 32), (2, 1, 32, 32), (2, 3, 32)):
        with pytest.raises(ValueError, match=r"\(batch, 3, height, width\), not.*32"):
            model(torch.zeros(shape))


@pytest.mark.parametrize("family", NAMES)
def test_sizes_that_make_no_network_are_refused(family):
    wrong = {"in_chans": 0, "patch_size": (4, 0), "num_classes": -1}
    if family == "d2_convnext":
        wrong |= {"depths": (1, 0, 1, 1), "dims": (4, 4, 4, 0)}
    else:
        wrong |= {"depth": 0, "embed_dim": 0}
    for size, value in wrong.items():
        with pytest.raises(ValueError, match=f"{size} must be at least .*, not .*[0-]"):
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
