"""What networks start from: the published rule, and what scales it."""

import pytest
import timm
import torch
from tiny import NAMES, create
from torch import Tensor


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
