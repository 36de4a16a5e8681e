"""FLOPs and parameters: against the published counts, torch's counter and the closed formula."""

import json
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deit.measure.flops import PER_OUTPUT, count_flops
from deit.measure.formula import closed_form
from deit.measure.networks import build, on_meta, trainable
from deit.measure.roofline import matrix_products

FACTS = json.loads((Path(__file__).parents[1] / "fixtures" / "complexity_facts.json").read_text())
PRODUCTS = ("addmm", "bmm", "conv", "linear", "matmul", "mm")
SMALL = ("tiny", "small", "medium", "_12", "_24", "_36")
# one of each family, and what differs within it
VARIETY = (
    "deit_tiny_patch16_LS",
    "d2_deit_tiny_patch16_LS",
    "hybrid_deit_tiny_patch16_LS",
    "d2_inv_early_deit_tiny_patch16_LS",
    "resmlp_12",
    "resmlp_equi_d2_12",
    "convnext_isotropic_small",
    "d2_convnext_isotropic_small",
    "d2_convnext_tiny",
    "convnext_tiny",
)


def is_small(name):
    return any(part in name for part in SMALL) and "B_24" not in name and "L_24" not in name


@cache
def count(name, img_size=None):
    return count_flops(*on_meta(name, img_size))


def cases(names):
    slow = ("base", "large", "huge", "_36", "B_24", "L_24")
    return [
        pytest.param(name, marks=pytest.mark.slow if any(part in name for part in slow) else ())
        for name in names
    ]


@pytest.mark.parametrize("name", cases(FACTS))
def test_published_counts(name):
    model, _ = on_meta(name)
    assert all(p.is_meta for p in model.parameters())  # so that no size needs memory
    assert trainable(model) == FACTS[name]["trainable"]
    counted = count(name)
    assert not counted.uncounted
    tolerance = 0.03 if is_small(name) else 0.01
    total = counted.total - unread(name, model)
    assert total / 1e9 == pytest.approx(FACTS[name]["gflops"], rel=tolerance)


def unread(name, model):
    """Multiply-adds of a last product that no head reads: the antisymmetric half of an isotropic
    ConvNeXt. The published count, which traces what the logits depend on, leaves it out."""
    if not name.startswith("d2_convnext_isotropic"):
        return 0
    places = (224 // model.feature_info[-1]["reduction"]) ** 2
    return places * model.blocks[-1].pwconv2.linear_asym.weight.numel()


def test_ordinary_transformers_are_counted_exactly_as_published():
    for name in ("deit_tiny_patch16_LS", "deit_base_patch16_LS", "resmlp_12"):
        gflops = count(name).total / 1e9
        assert gflops == pytest.approx(FACTS[name]["gflops"], abs=5e-5)  # they give four digits


@pytest.mark.parametrize(
    ("name", "img_size"), [*((name, 224) for name in VARIETY), (VARIETY[2], 64), (VARIETY[8], 64)]
)
def test_three_counts_agree(name, img_size):
    model, image = on_meta(name, img_size)
    counted = count(name, None if img_size == 224 else img_size)
    assert closed_form(model, img_size) == pytest.approx(counted.total, rel=3e-3)

    products = sum(counted.by_operator[operator] for operator in PRODUCTS)
    # without gradients at all: torch's counter fails on a view of a parameter made under no_grad
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() == 2 * products  # it counts two for a multiply-add
    assert sum(p.multiply_adds for p in matrix_products(model, image)) == products


def test_equivariance_halves_the_linear_maps():
    ordinary, equivariant = (
        sum(p.multiply_adds for p in matrix_products(*on_meta(name)) if p.weights)
        for name in ("deit_base_patch16_LS", "d2_deit_base_patch16_LS")
    )
    patches = 196 * 3 * 16**2 * 768  # a mirrored kernel is as large as an ordinary one
    assert 2 * (equivariant - patches) == ordinary - patches


@pytest.mark.parametrize("name", ["deit_tiny_patch16_LS", "d2_deit_tiny_patch16_LS"])
def test_fused_attention_counts_as_unfused(name):
    totals = []
    for fused in (True, False):
        with torch.device("meta"):
            model = timm.create_model(name, use_fused_attn=fused)
        totals.append(count_flops(model, torch.empty(1, 3, 224, 224, device="meta")).total)
    assert totals[0] == totals[1]


def test_what_is_built_attends_fused():
    model, _ = build("d2_deit_tiny_patch16_LS", img_size=32, device="meta")
    assert all(block.attn.fused_attn for block in model.blocks)
    assert not model.training


def test_meta_tensors_count_as_real_ones():
    name = "d2_convnext_isotropic_small"
    model, image = on_meta(name, 32)
    real, size = build(name, img_size=32)
    assert count_flops(real, torch.zeros(1, 3, size, size)) == count_flops(model, image)


def test_counting_leaves_the_mode_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    count_flops(model, torch.zeros(1, 4))
    assert model.training


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


OPERATIONS = {
    "abs": torch.abs,
    "add": lambda x: x + 1.0,
    "addcmul": lambda x: torch.addcmul(x, x, x),
    "div": lambda x: x / 3.0,
    "gelu": F.gelu,
    "mul": lambda x: x * x,
    "neg": lambda x: -x,
    "pow": lambda x: x.pow(3),
    "rsqrt": torch.rsqrt,
    "rsub": lambda x: 1 - x,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
    "sqrt": torch.sqrt,
    "square": torch.square,
    "sub": lambda x: x - x,
}


@pytest.mark.parametrize("name", PER_OUTPUT)
def test_pointwise_costs(name):
    counted = count_flops(Call(OPERATIONS[name]), torch.zeros(2, 5, device="meta"))
    assert counted.by_operator == {name: 10 * PER_OUTPUT[name]}
    assert not counted.uncounted


def test_operation_in_place():
    assert count_flops(Call(lambda x: (x + 1).mul_(2)), torch.zeros(3)).total == 6


def test_arithmetic_on_sizes_is_free():
    def half(x):
        return x[:, : x.shape[1] // 2 + 1] * (x.shape[1] - 1)

    assert count_flops(Call(half), torch.zeros(1, 8, device="meta")).total == 5


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        (lambda x: x.mean(-1), 24),
        (lambda x: x.var(-1), 4 * 24),
        (lambda x: x @ x.mT, 2 * 3 * 4 * 3),
        (lambda x: torch.baddbmm(x.new_zeros(1), x, x.mT), 2 * 3 * 4 * 3),
        (lambda x: F.layer_norm(x, (4,), x.new_ones(4)), 5 * 24),
        (lambda x: x.flip(-1).unflatten(-1, (2, 2)).repeat(1, 2, 1, 1), 0),
        # scaling 24, two products of 2*3*3*4, softmax 5 on 2*3*3
        (lambda x: F.scaled_dot_product_attention(x, x, x), 24 + 144 + 90),
    ],
)
def test_costs_of_other_operations(function, flops):
    counted = count_flops(Call(function), torch.zeros(2, 3, 4, device="meta"))
    assert counted.total == flops
    assert not counted.uncounted


def test_convolutions():
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=(1, 0), groups=2, device="meta")
    image = torch.zeros(1, 4, 8, 9, device="meta")
    height, width = conv(image).shape[-2:]
    assert count_flops(conv, image).total == height * width * 8 * 9 * 4 // 2


def test_an_operation_without_a_cost_is_named():
    counted = count_flops(Call(lambda x: torch.erfinv(x) + 1), torch.zeros(3))
    assert counted.total == 3
    assert dict(counted.uncounted) == {"aten::erfinv": 1}
