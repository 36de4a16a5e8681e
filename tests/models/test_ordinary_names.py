"""Ordinary networks: parallel branches, no LayerScale, and hosted weights under our keys."""

from unittest.mock import Mock

import pytest
import timm
import torch
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

from deit.equivariance import randomize_
from deit.models.ordinary import resmlp_filter_fn, vit_filter_fn
from deit.models.registry import HOSTED

TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
# name: width, branches of each half, whether with LayerScale, blocks
ADDED = {
    "deit_huge_patch14_26x2_LS": (1280, 52, True, 26),
    "deit_small_patch16_36": (384, 36, False, 36),
    "deit_small_patch16_18x2": (384, 36, False, 18),
    "deit_small_patch16_18x2_LS": (384, 36, True, 18),
    "deit_base_patch16_18x2": (768, 36, False, 18),
    "deit_base_patch16_18x2_LS": (768, 36, True, 18),
    "deit_base_patch16_36x1": (768, 36, False, 36),
}


@pytest.mark.parametrize("name", ADDED)
def test_added_names(name):
    width, branches, scaled, blocks = ADDED[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert len(model.blocks) == blocks
    # linear maps with their shifts, two layer norms, and LayerScale of each half
    each = 12 * width**2 + 9 * width + 4 * width + 2 * width * scaled
    assert sum(p.numel() for p in model.blocks.parameters()) == branches * each
    names = {name.partition(".")[0] for name, _ in model.blocks[0].named_parameters()}
    expected = {"norm1", "attn", "norm2", "mlp"} | ({"gamma_1", "gamma_2"} if scaled else set())
    if blocks < branches:
        expected |= {"norm11", "attn1", "norm21", "mlp1"}
        expected |= {"gamma_1_1", "gamma_2_1"} if scaled else set()
    assert names == expected


@pytest.mark.parametrize("name", ["deit_small_patch16_18x2", "deit_small_patch16_18x2_LS"])
def test_branches_are_parallel(name):
    model = randomize_(timm.create_model(name, **TINY, drop_path_rate=0.1)).eval()
    block, x = model.blocks[0], torch.randn(2, 17, 32)

    def scaled(gamma, y):
        return y if gamma is None else gamma * y

    with torch.no_grad():
        y = x + scaled(block.gamma_1, block.attn(block.norm1(x)))
        y = y + scaled(block.gamma_1_1, block.attn1(block.norm11(x)))
        z = y + scaled(block.gamma_2, block.mlp(block.norm2(y)))
        z = z + scaled(block.gamma_2_1, block.mlp1(block.norm21(y)))
        torch.testing.assert_close(block(x), z)
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    block.reset_parameters()
    assert all((p == 1e-4).all() for p in block.parameters(recurse=False))


@pytest.mark.parametrize("name", HOSTED)
def test_hosted_networks_are_the_same(name):
    """Every tensor of timm's network has its place and shape in ours."""
    with torch.device("meta"):
        options = {"patch_size": 8} if name == "resmlpB_24" else {}
        ours = timm.create_model(name, **options)
        theirs = timm.create_model(HOSTED[name])
    filter_fn = resmlp_filter_fn if "resmlp" in name else vit_filter_fn
    state = filter_fn(theirs.state_dict(), ours)
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }
    assert timm.is_model_pretrained(name)
    assert ours.pretrained_cfg["hf_hub_id"] == f"timm/{HOSTED[name]}"


RESMLP = {key: value for key, value in TINY.items() if key not in ("num_heads", "depth")}


@pytest.mark.parametrize("name", ["deit_small_patch16_LS", "resmlp_12"])
def test_translated_weights_compute_the_same(name):
    if name == "resmlp_12":  # timm's entry point fixes the size
        options = dict(RESMLP, depth=2)
        theirs = MlpMixer(
            **RESMLP, num_blocks=2, mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine
        )
    else:
        options = TINY
        theirs = timm.create_model(HOSTED[name].partition(".")[0], **TINY)
    state = randomize_(theirs).eval().state_dict()
    overlay = dict(state_dict=state, num_classes=5)
    ours = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs(images))


def test_another_patch_size_is_named():
    state = timm.create_model("resmlp_12", img_size=32, patch_size=8, depth=1).state_dict()
    with pytest.raises(ValueError, match=r"patches of 8 pixels.*patch_size=8"):
        resmlp_filter_fn(state, timm.create_model("resmlp_12", img_size=32, depth=1))


HUB = "timm.models._builder.load_state_dict_from_hf"


@pytest.mark.parametrize("name", ["deit_small_patch16_LS", "resmlp_12"])
def test_without_a_network_one_line(name, monkeypatch):
    problem = OSError("We couldn't connect to\n'https://huggingface.co'")
    monkeypatch.setattr(HUB, Mock(side_effect=problem))
    with pytest.raises(RuntimeError, match=f"weights of {name}.*couldn't connect.*file=") as error:
        timm.create_model(name, pretrained=True)
    assert error.value.__suppress_context__
    assert "\n" not in str(error.value)


def test_errors_of_the_hub_that_say_it_themselves(monkeypatch):
    """Of weights that the user names, and of hosted ones that do not fit."""
    monkeypatch.setattr(HUB, Mock(side_effect=OSError("no such repository")))
    own = dict(pretrained_cfg_overlay=dict(hf_hub_id="somebody/weights"))
    with pytest.raises(OSError, match="no such repository"):
        timm.create_model("d2_deit_tiny_patch16_LS", pretrained=True, **own)
    monkeypatch.setattr(HUB, Mock(side_effect=RuntimeError("size mismatch for head.weight")))
    with pytest.raises(RuntimeError, match=r"^size mismatch"):
        timm.create_model("resmlp_12", pretrained=True)
