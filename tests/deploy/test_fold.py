"""A folded network computes what the original does, with all parameters random."""

import copy
import pickle

import pytest
import torch
from tiny import EQUIVARIANT, EQUIVARIANT_TRANSFORMERS, NAMES, create_random, images, x32
from torch import nn

from deit.deploy import fold
from deit.deploy.pair import PairMlp, Residual, RowMlp
from deit.equivariance import randomize_
from deit.errors import UserError
from deit.models import ResMLP

TARGETS = ("torch", "onnx")
CONVNEXTS = ["d2_convnext_isotropic", "d2_convnext"]
ABSOLUTE = dict(use_symmetrized_asym_feats=True)

# family, image size, options
CASES = [
    *((name, (32, 32), {}) for name in NAMES),
    *((name, size, dict(depth=2, **options))
      for name in EQUIVARIANT_TRANSFORMERS
      for size, options in [
          ((32, 32), dict(global_pool="avg", class_token=False)),
          ((32, 32), dict(global_pool="", reg_tokens=2)),
          ((32, 32), dict(num_classes=0, qkv_bias=False)),
          ((32, 32), dict(embed_dim=48, num_heads=4)),  # a scale that float32 rounds
          ((32, 32), dict(use_attn_mixer=True)),
          ((16, 8), dict(img_size=(16, 8))),
          ((48, 40), dict(dynamic_img_size=True)),
          ((24, 64), dict(dynamic_img_size=True, global_pool="")),
      ]),
    *(("d2_deit", (32, 32), dict(ABSOLUTE, global_pool=pool)) for pool in ("token", "avg", "")),
    *((name, (32, 32), dict(break_layer=depth))
      for name in ("hybrid_deit", "d2_inv_early_deit") for depth in (0, 1, 4)),
    *(("resmlp_equi_d2", size, dict(img_size=size, depth=2, **options))
      for size in [(32, 32), (24, 40), (16, 8)]
      for options in (dict(ABSOLUTE, num_classes=7), dict(global_pool="", num_classes=0))),
    *((name, size, options)
      for name in CONVNEXTS
      for size, options in [
          ((17, 80), {}),
          ((32, 48), dict(layer_scale_init_value=0.0, num_classes=0)),
          ((32, 48), dict(ABSOLUTE, global_pool="")),
          ((32, 48), ABSOLUTE),
      ]),
]  # fmt: skip


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative to the norm; shapes must agree."""
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize(("family", "size", "options"), CASES)
def test_the_same_function(family, size, options):
    model = create_random(family, **options)
    x = images(3, size)
    expected = model(x)
    for target in TARGETS:
        assert difference(fold(model, target)(x), expected) < 1e-12
        single = fold(copy.deepcopy(model).float(), target)
        assert difference(single(x.float()), expected) < 1e-5


@pytest.mark.parametrize("family", EQUIVARIANT)
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


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", EQUIVARIANT)
def test_a_copy_in_standard_layers_that_can_be_pickled_and_scripted(family, target):
    model = create_random(family).train()
    before = copy.deepcopy(model.state_dict())
    folded = fold(model, target)
    assert (model.training, folded.training) == (True, False)
    copies = [pickle.loads(pickle.dumps(folded))]
    if "deit" not in family or hasattr(torch.compiler, "is_exporting"):
        copies.append(torch.jit.script(folded))  # torch 2.6 cannot trace a class token's expansion
    for same in copies:
        assert torch.equal(same(images()), folded(images()))
    with pytest.raises(ValueError, match=r"images must be of shape \(batch, 3, height, width\)"):
        folded(images()[0])
    own = {parameter.data_ptr() for parameter in model.parameters()}
    for parameter in folded.parameters():
        assert not parameter.requires_grad
        assert parameter.data_ptr() not in own
        parameter.zero_()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    if "deit" in family:
        folded.blocks = None  # those after a bridge are timm's
    leaves = {type(m) for m in folded.modules() if not list(m.children()) and list(m.parameters())}
    assert leaves <= {nn.Linear, nn.Conv2d, nn.Conv1d, nn.LayerNorm}


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
            module.register_forward_hook(lambda _, x, y: dense.extend((*x[0], *y)))
    folded(images())
    assert len(dense) >= 8
    assert all(part.is_contiguous() for part in dense)


@pytest.mark.parametrize("family", EQUIVARIANT)
def test_half_precision(family):
    model = create_random(family).float()
    x = x32()
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


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("blocks.0.mlp.fc1", "Adapted stands where an equivariant Linear was"),
        ("blocks.1.norm1", "VisionTransformer cannot be folded, because one of its layers"),
    ],
)
def test_wrapped_layers(layer, said):
    model = create_random("d2_deit")
    model.set_submodule(layer, Adapted(model.get_submodule(layer), nn.Identity()))
    with pytest.raises(UserError, match=said):
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
    folded = fold(torch.compile(outer))  # of a compiled one what is behind it
    assert difference(folded(images()), outer(images())) < 1e-12
    assert outer[1] is model
    assert not isinstance(folded[1], type(model))
    assert folded[0].weight is not outer[0].weight


def test_a_network_in_two_places_and_a_subclass():
    """What is there twice is folded once; a subclass may compute something else."""

    class Doubled(ResMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    network, other = create_random("d2_deit"), create_random("resmlp_equi_d2")
    other.__class__ = Doubled
    outer = nn.ModuleDict({"student": network, "teacher": network, "other": other}).train()
    folded = fold(outer)
    assert folded["student"] is folded["teacher"]
    assert not isinstance(folded["student"], type(network))
    assert all(module.training for module in outer.modules())
    assert type(folded["other"]) is Doubled
    assert folded["other"] is not other
