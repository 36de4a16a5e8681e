"""Weights in files: timm's ways to load them, and to save and rebuild a model."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.models import load_checkpoint
from timm.models._hub import save_for_hf
from tiny import EQUIVARIANT, FAMILIES, NAMES, TRANSFORMERS, create, create_random, x32


@pytest.mark.parametrize("family", EQUIVARIANT)
def test_no_weights_are_hosted_and_the_error_says_how_to_load_a_file(family):
    name, _ = FAMILIES[family]
    with pytest.raises(RuntimeError, match=f"no hosted weights exist for {name}.*file="):
        create(family, pretrained=True)
    assert not timm.is_model_pretrained(name)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("family", NAMES)
def test_weights_from_files(family, suffix, tmp_path):
    source, x = create_random(family).float(), x32()
    path = str(tmp_path / f"weights.{suffix}")
    if suffix == "pth":
        state = {f"_orig_mod.{k}": v for k, v in source.state_dict().items()}
        torch.save({"model": state, "epoch": 3}, path)
    else:
        save_file(source.state_dict(), path)
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=path, num_classes=10))
    again = create(family)
    load_checkpoint(again, path)
    for loaded in (again, create(family, checkpoint_path=path), create(family, **options)):
        torch.testing.assert_close(loaded(x), source(x))
    other = create(family, num_classes=4, **options)
    assert other(x).shape == (2, 4)
    torch.testing.assert_close(other.forward_features(x), source.forward_features(x))
    backbone = create(family, features_only=True, out_indices=(0, 1), **options)
    expected = source.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    torch.testing.assert_close(backbone(x), expected)
    grey = create(family, in_chans=1, **options).double()
    one = x[:, :1].double()  # the weights were summed over the channels in float32
    expected = source.double()(one.expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey(one), expected, rtol=1.3e-6, atol=1e-5)
    if family in TRANSFORMERS:  # for images of another size
        resized, larger = create(family, img_size=(40, 56), **options), x32(2, (40, 56))
        source.float().set_input_size(img_size=(40, 56))
        torch.testing.assert_close(resized(larger), source(larger))


@pytest.mark.parametrize("family", NAMES)
def test_saved_models_are_rebuilt_with_their_changes(family, tmp_path):
    """timm's save_for_hf and 'local-dir:' bring back a resized network with another head."""
    source = create_random(family, in_chans=4).float()
    size = (32, 32)
    if family in TRANSFORMERS:
        size = (40, 56)
        source.set_input_size(img_size=size)
    source.reset_classifier(7, "avg")
    save_for_hf(source, tmp_path)
    restored = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (restored.num_classes, restored.global_pool, restored.in_chans) == (7, "avg", 4)
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(restored(x), source(x))
    config = resolve_model_data_config(restored)
    if family in TRANSFORMERS:
        assert config["input_size"] == (4, *size)
