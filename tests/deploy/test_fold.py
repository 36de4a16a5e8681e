"""A folded network computes what the original does, with all parameters random."""

import copy
import io
import itertools
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from deit.deploy import fold
from deit.deploy.pair import PairMlp, Residual, RowMlp
from deit.equivariance import randomize_
from deit.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny import EQUIVARIANT_TRANSFORMERS, INVARIANT, NAMES, create_random, images, registered

TARGETS = ("torch", "onnx")
FOLDED = [name for name in NAMES if "d2" in name or "hybrid" in name]
CONVNEXTS = ["d2_convnext_isotropic", "d2_convnext"]
WHOLE = ["d2_deit_small_patch16_LS", "resmlp_equi_d2_12", "d2_convnext_tiny"]
WIDTHS = [name for name in registered() if "d2_" in name or "hybrid" in name]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative to the norm; shapes must agree."""
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def check(family: str, size: tuple[int, int] = (32, 32), **options) -> None:
    model = create_random(family, **options)
    x = images(3, size)
    expected = model(x)
    for target in TARGETS:
        assert difference(fold(model, target)(x), expected) < 1e-12
        single = fold(copy.deepcopy(model).float(), target)
        assert difference(single(x.float()), expected) < 1e-5


@pytest.mark.parametrize("family", NAMES)
def test_every_family(family):
    check(family)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((32, 32), dict(global_pool="avg", class_token=False)),
        ((32, 32), dict(global_pool="", reg_tokens=2)),
        ((32, 32), dict(num_classes=0, qkv_bias=False)),
        ((32, 32), dict(embed_dim=48, num_heads=4)),  # a scale that float32 rounds
        ((32, 32), dict(use_attn_mixer=True)),
        ((24, 40), dict(img_size=(24, 40), global_pool="")),
        ((16, 8), dict(img_size=(16, 8))),
        ((48, 40), dict(dynamic_img_size=True)),
        ((24, 64), dict(dynamic_img_size=True, global_pool="")),
        ((32, 32), dict(dynamic_img_size=True)),
    ],
)
@pytest.mark.parametrize("family", EQUIVARIANT_TRANSFORMERS)
def test_transformers(family, size, options):
    check(family, size, depth=2, **options)


@pytest.mark.parametrize("pool", ["token", "avg", ""])
def test_absolute_antisymmetric_features(pool):
    check("d2_deit", use_symmetrized_asym_feats=True, global_pool=pool)


@pytest.mark.parametrize("family", ["hybrid_deit", "d2_inv_early_deit"])
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_bridges_in_other_places(family, depth):
    check(family, break_layer=depth)


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (16, 8)])
@pytest.mark.parametrize("pool", ["avg", ""])
@pytest.mark.parametrize(("absolute", "classes"), [(False, 0), (True, 7)])
def test_resmlp(size, pool, absolute, classes):
    options = dict(use_symmetrized_asym_feats=absolute, global_pool=pool, num_classes=classes)
    check("resmlp_equi_d2", size, img_size=size, depth=2, **options)


@pytest.mark.parametrize("family", CONVNEXTS)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((17, 80), {}),
        ((32, 48), dict(layer_scale_init_value=0.0, num_classes=0)),
        ((32, 48), dict(global_pool="", num_classes=0)),
        ((32, 48), dict(global_pool="", use_symmetrized_asym_feats=True)),
        ((32, 48), dict(use_symmetrized_asym_feats=True)),
    ],
)
def test_convnexts(family, size, options):
    check(family, size, **options)


@pytest.mark.parametrize("family", FOLDED)
def test_pruned(family):
    """What stood behind the dropped blocks no longer removes anything."""
    model = create_random(family)
    model.prune_intermediate_layers([0], prune_norm=True)
    randomize_(model)
    x = images()
    for target in TARGETS:
        assert difference(fold(model, target)(x), model(x)) < 1e-12


def test_other_image_and_patch_sizes():
    model = create_random("d2_deit")
    model.set_input_size((40, 60), (10, 10))
    x = images(2, (40, 60))
    assert difference(fold(model)(x), model(x)) < 1e-12


@pytest.mark.parametrize("family", FOLDED)
def test_the_original_stays_as_it_is(family):
    model = create_random(family).train()
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    assert model.training
    assert not folded.training
    own = {parameter.data_ptr() for parameter in model.parameters()}
    for parameter in folded.parameters():
        assert parameter.data_ptr() not in own
        parameter.zero_()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(("family", "target"), list(itertools.product(FOLDED, TARGETS)))
def test_standard_layers_alone(family, target):
    folded = fold(create_random(family), target)
    ordinary = [id(m) for m in folded.blocks.modules()] if "deit" in family else []
    leaves = [m for m in folded.modules() if not list(m.children()) and list(m.parameters())]
    others = [m for m in leaves if id(m) not in ordinary]
    assert {type(m) for m in others} <= {nn.Linear, nn.Conv2d, nn.Conv1d, nn.LayerNorm}
    assert not any(parameter.requires_grad for parameter in folded.parameters())


@pytest.mark.parametrize("family", ["d2_deit", "resmlp_equi_d2", "d2_convnext_isotropic"])
def test_chunks(family, monkeypatch):
    """Cut into chunks or not, the numbers are the same; a last chunk may be shorter."""
    folded = fold(create_random(family))
    x = images(3)
    expected = folded(x)
    monkeypatch.setattr(RowMlp, "CHUNK_ROWS", 5)
    seen = []
    whole = PairMlp.forward
    monkeypatch.setattr(PairMlp, "forward", lambda m, x: seen.append(len(x[0])) or whole(m, x))
    assert difference(folded(x), expected) < 1e-13
    assert max(seen) == 5
    assert len(seen) > 10


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", CONVNEXTS)
def test_maps_are_dense(family, target):
    """Of strided ones the linear layers would make many small products."""
    folded = fold(create_random(family), target)
    dense = []
    for module in folded.modules():
        if isinstance(module, Residual):
            module.register_forward_hook(
                lambda _, inputs, outputs: dense.extend(
                    part.is_contiguous() for part in (*inputs[0], *outputs)
                )
            )
    folded(images())
    assert len(dense) >= 8
    assert all(dense)


@pytest.mark.parametrize("family", FOLDED)
def test_half_precision(family):
    model = create_random(family).float()
    x = images(2, dtype=torch.float32)
    assert difference(fold(model).bfloat16()(x.bfloat16()), model(x)) < 0.1
    assert fold(model.bfloat16())(x.bfloat16()).dtype == torch.bfloat16


def test_errors():
    model = create_random("d2_deit")
    with pytest.raises(UserError, match="target 'tflite' is not known: use torch or onnx"):
        fold(model, "tflite")
    with pytest.raises(ValueError, match="images are 40 x 32 pixels"):
        fold(model)(images(1, (40, 32)))
    with pytest.raises(ValueError, match="equivariance needs a width"):
        fold(create_random("d2_convnext"))(images(1, (32, 36)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("quantise", [False, True])
def test_layers_that_are_not_linear(quantise):
    model = create_random("d2_deit").float()
    if quantise:
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    else:
        model.blocks[0].mlp.fc1.linear_sym = nn.Sequential(nn.Linear(16, 64), nn.ReLU())
    with pytest.raises(UserError, match="before you quantise it"):
        fold(model)


@pytest.mark.parametrize("family", ["d2_deit", "resmlp_equi_d2", "d2_convnext_isotropic"])
def test_adapters_fold_too(family):
    """Whatever stands in place of a linear layer, as long as it is linear."""
    model = create_random(family)
    for block in model.blocks:
        for name, layer in list(block.named_modules()):
            if type(layer) is nn.Linear:
                change = nn.Linear(layer.in_features, layer.out_features, bias=False)
                block.set_submodule(name, Adapted(layer, change.double()))
    for target in TARGETS:
        assert difference(fold(model, target)(images()), model(images())) < 1e-12


class Adapted(nn.Module):
    def __init__(self, layer: nn.Linear, change: nn.Module):
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.change(x)


def test_a_network_inside_another_module():
    model = create_random("d2_deit")
    outer = nn.Sequential(nn.BatchNorm2d(3).double(), model).eval()
    folded = fold(outer)
    assert difference(folded(images()), outer(images())) < 1e-12
    assert outer[1] is model
    assert not isinstance(folded[1], type(model))
    assert folded[0].weight is not outer[0].weight


def test_a_compiled_network():
    model = create_random("d2_deit")
    assert difference(fold(torch.compile(model))(images()), model(images())) < 1e-12


@pytest.mark.parametrize("family", INVARIANT)
def test_still_invariant(family):
    folded = fold(create_random(family))
    x = images()
    assert difference(folded(x.flip(-1)), folded(x)) < 1e-10


@pytest.mark.parametrize("family", FOLDED)
def test_survives_a_file(family):
    folded = fold(create_random(family))
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(images()), folded(images()), rtol=0, atol=0)


def check_published(name: str, side: int, **options) -> None:
    model = randomize_(timm.create_model(name, num_classes=10, **options).eval().double())
    x = images(1, (side, side))
    with torch.no_grad():
        expected = model(x)
        for target in TARGETS:
            assert difference(fold(model, target)(x), expected) < 1e-11
        single = fold(model.float())
        assert difference(single(x.float()), expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_published_networks(name):
    check_published(name, 224)


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDTHS)
def test_published_widths(name):
    """Of every name, with a block or two; all but ResMLP on small images."""
    if "deit" in name:
        side = 56 if "patch14" in name else 64
        check_published(name, side, img_size=side, depth=2)
    elif "d2_convnext_" in name and "isotropic" not in name:
        check_published(name, 64, depths=(1, 1, 1, 1))
    else:
        check_published(name, 64 if "convnext" in name else 224, depth=2)
