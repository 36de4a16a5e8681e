"""What networks start from: the published rule, and scales like those of ordinary networks.

Blocks are compared at the width of the small networks, 384, with LayerScale 1. Their branches start
smaller than an ordinary block's, because a weight of the same standard deviation (0.02, the
published rule) has half the fan-in: the outputs of a block differ by 1 to 3 % at width 384, by 5 to
7 % at 768 and by 12 to 14 % at 1280.
"""

import pytest
import timm
import torch
from tiny import NAMES, create, images
from torch import Tensor, nn

from deit.groups import FLOP
from deit.layers import (
    Block,
    ConvBlock,
    MirrorGrid,
    MixerBlock,
    OrdinaryBlock,
    OrdinaryConvBlock,
    OrdinaryMixerBlock,
    PatchEmbed,
)
from deit.models import IsotropicConvNeXt
from deit.models.base import init_linear

SEEDS = range(10)
WIDTH, GRID = 384, MirrorGrid(14, 14)


def init_convnext(module):
    init_linear(module, IsotropicConvNeXt.drawn)


BLOCKS = {
    "transformer": (
        lambda: Block(WIDTH, 6, init_values=1.0),
        lambda: OrdinaryBlock(WIDTH, 6, init_values=1.0),
        init_linear,
        (2, 50, WIDTH),
    ),
    "mixer": (
        lambda: MixerBlock(FLOP.regular(WIDTH), GRID.rep, init_values=1.0),
        lambda: OrdinaryMixerBlock(WIDTH, 14 * 14, init_values=1.0),
        init_linear,
        (1, 14 * 14, WIDTH),
    ),
    "convolution": (
        lambda: ConvBlock(WIDTH, init_value=1.0),
        lambda: OrdinaryConvBlock(WIDTH, init_value=1.0),
        init_convnext,
        (1, 8, 8, WIDTH),
    ),
}


def scales(make, init, shape: tuple[int, ...]) -> Tensor:
    """Norms of the output and of the gradient in the input, for input and gradient of unit
    variance; means over seeds."""
    found = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        block = make().apply(init)
        x = torch.randn(shape, requires_grad=True)
        ordinary = isinstance(block, OrdinaryBlock | OrdinaryMixerBlock | OrdinaryConvBlock)
        y = block(x) if ordinary else torch.cat(block(x.chunk(2, -1)), -1)
        y.backward(torch.randn(shape))
        found.append(torch.stack([y.detach().norm(), x.grad.norm()]))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_blocks_start_with_the_scale_of_ordinary_ones(kind):
    equivariant, ordinary, init, shape = BLOCKS[kind]
    ratio = scales(equivariant, init, shape) / scales(ordinary, init, shape)
    assert (ratio - 1).abs().max() < 0.1, ratio

    def too_large(module: nn.Module) -> None:  # the comparison sees a scale that is wrong
        init(module)
        if isinstance(module, nn.Linear | nn.Conv2d):
            with torch.no_grad():
                module.weight.mul_(4)

    ratio = scales(equivariant, too_large, shape) / scales(ordinary, init, shape)
    assert (ratio - 1).abs().max() > 0.1


def test_patches_start_with_the_scale_of_ordinary_ones():
    """The factor root one half is for this: each stored weight is used twice."""
    equivariant, ordinary = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        images = torch.randn(2, 3, 64, 64)
        equivariant.append(torch.cat(PatchEmbed(64, 16, 3, WIDTH)(images)).norm())
        ordinary.append(nn.Conv2d(3, WIDTH, 16, 16)(images).norm())
    ratio = torch.stack(equivariant).mean() / torch.stack(ordinary).mean()
    assert abs(ratio - 1) < 0.1


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


def test_shifts_of_a_resmlp_can_be_trained():
    model = create("resmlp_equi_d2")
    model(images(dtype=torch.float32)).sum().backward()
    betas = [p for n, p in model.named_parameters() if "beta_" in n]
    assert len(betas) == 4 * 2 * 2
    assert all(p.grad.any() for p in betas)
