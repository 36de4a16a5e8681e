"""What networks start from: the published rule, and scales like those of ordinary networks.

Blocks are compared at the width of the small networks, 384, with LayerScale 1. Their branches start
smaller than an ordinary block's, because a weight of the same standard deviation (0.02, the
published rule) has half the fan-in: the outputs of a block differ by 1 to 3 % at width 384, by 5 to
7 % at 768 and by 12 to 14 % at 1280.
"""

import pytest
import torch
from tiny import create
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


WIDE = dict(embed_dim=256, num_classes=200)


def parameters_of(family: str, **kwargs) -> dict[str, Tensor]:
    torch.manual_seed(0)
    options = dict(WIDE, num_heads=4) if "deit" in family else WIDE
    return dict(create(family, **{**options, **kwargs}).named_parameters())


def is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and ("blocks" in name or name.startswith("head"))


@pytest.mark.parametrize(
    "family",
    [
        "d2_deit",
        "hybrid_deit",
        "d2_inv_early_deit",
        "deit",
        "resmlp_equi_d2",
        "resmlp",
        "d2_convnext_isotropic",
        "convnext_isotropic",
    ],
)
def test_the_published_rule(family):
    parameters = parameters_of(family)
    for name, parameter in parameters.items():
        if is_matrix(name, parameter) and parameter.numel() > 2000:
            assert abs(parameter.std() / 0.02 - 1) < 0.1, name
            assert abs(parameter.mean()) < 0.005, name
            assert parameter.abs().max() < 2, name
        elif name.endswith("bias") and not name.startswith("patch_embed"):
            assert not parameter.any(), name
        elif "alpha" in name and "gamma" not in name:
            assert (parameter == 1).all(), name
        elif "beta" in name:
            assert not parameter.any(), name
        elif name.startswith(("pos_embed", "cls_token")):
            assert abs(parameter.std() / 0.02 - 1) < 0.2, name


@pytest.mark.parametrize("family", ["d2_deit", "resmlp_equi_d2"])
def test_patch_kernels_start_like_torchs_with_the_stored_fan_in(family):
    parameters = parameters_of(family)
    bound = (3 * 8 * 4) ** -0.5
    for name in ("proj_sym.weight", "proj_asym.weight", "proj_sym.bias"):
        parameter = parameters[f"patch_embed.{name}"]
        assert 0.95 * bound < parameter.abs().max() <= bound, name
        assert abs(parameter.std() / (bound / 3**0.5) - 1) < 0.1, name


@pytest.mark.parametrize("family", ["d2_convnext_isotropic", "convnext_isotropic"])
def test_convolutions_of_convnext_start_like_its_linear_maps(family):
    kernels = {n: p for n, p in parameters_of(family).items() if n.startswith("stem")}
    for name, parameter in kernels.items():
        if name.endswith("weight"):
            assert abs(parameter.std() / 0.02 - 1) < 0.1, name
        else:
            assert not parameter.any(), name


@pytest.mark.parametrize(
    ("family", "value"),
    [
        ("d2_deit", 1e-4),
        ("hybrid_deit", 1e-4),
        ("deit", 1e-4),
        ("resmlp_equi_d2", 0.1),
        ("resmlp", 0.1),
    ],
)
def test_layer_scale(family, value):
    def gammas(**kwargs):
        found = [p for n, p in parameters_of(family, **kwargs).items() if "gamma" in n]
        return torch.cat([p.flatten() for p in found])

    assert torch.equal(gammas(), torch.full_like(gammas(), value))
    for argument in ("init_scale", "init_values", "layer_scale_init_value"):
        assert torch.equal(gammas(**{argument: 0.5}), torch.full_like(gammas(), 0.5))


def test_layer_scale_of_convnext():
    names = parameters_of("d2_convnext_isotropic", layer_scale_init_value=0)
    assert not any("gamma" in n for n in names)
    names = parameters_of("d2_convnext_isotropic", layer_scale_init_value=1e-6)
    assert {"blocks.0.gamma.alpha_sym", "blocks.3.gamma.alpha_asym"} <= set(names)


@pytest.mark.parametrize("family", ["d2_deit", "deit", "resmlp_equi_d2", "d2_convnext_isotropic"])
def test_head_init_scale(family):
    plain, scaled = parameters_of(family), parameters_of(family, head_init_scale=0.25)
    torch.testing.assert_close(scaled["head.weight"], plain["head.weight"] * 0.25)
    other = next(n for n in plain if n != "head.weight" and plain[n].ndim > 1)
    assert torch.equal(scaled[other], plain[other])


def test_the_attention_mixer_starts_with_the_symmetric_part_alone():
    mixers = [p for n, p in parameters_of("d2_deit", use_attn_mixer=True).items() if "mixer" in n]
    assert [m.tolist() for m in mixers] == [[1.0, 0.0]] * 4
