"""Every family behaves as a timm model: what timm's own tests, scripts and users rely on."""

import copy
from collections import Counter

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import FeatureInfo, group_parameters, model_entrypoint, safe_model_name
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from tiny import FAMILIES, NAMES, TRANSFORMERS, create, create_random, images, x32
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")


def test_every_registered_name_belongs_to_a_tested_family():
    ours = [n for n in timm.list_models() if model_entrypoint(n).__module__.startswith("deit.")]
    assert len(ours) == 57
    prefixes = {n: max((f for f in NAMES if n.startswith(f)), key=len, default=None) for n in ours}
    assert set(prefixes.values()) == set(NAMES)


@pytest.mark.parametrize("family", NAMES)
def test_unknown_arguments_are_errors(family):
    with pytest.raises(TypeError, match="not_an_argument"):
        create(family, not_an_argument=1)
    with pytest.raises(TypeError, match="initial LayerScale more than once"):
        create(family, init_scale=0.1, init_values=0.1)


@pytest.mark.parametrize("family", NAMES)
def test_widths_of_features_and_head(family):
    """As timm's default_cfgs tests: widths agree with what the model says of itself."""
    model, x = create(family), x32()
    features = model.forward_features(x)
    axis = 1 if features.ndim == 4 else -1
    assert features.shape[axis] == model.num_features
    if features.ndim == 3:  # timm holds transformers to one width
        assert model.head_hidden_size == model.num_features
    before = model.forward_head(features, pre_logits=True)
    assert before.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(before), model(x))
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.head_hidden_size == model.get_classifier().in_features

    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), before)
    model.reset_classifier(0, "")
    unpooled = model.forward_head(features).shape
    assert unpooled.numel() * features.shape[axis] == features.numel() * model.head_hidden_size
    assert model(x).shape == unpooled
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)
    if family != "deit":  # timm's own starts as torch's linear maps
        assert 0 < model.head.weight.abs().max() < 0.1  # truncated normal, 0.02
        assert not model.head.bias.any()
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.global_pool == "avg"

    assert create(family, num_classes=0)(x).shape == before.shape
    assert create(family, num_classes=0, global_pool="")(x).shape == unpooled


@pytest.mark.parametrize("family", NAMES)
def test_pretrained_cfg(family):
    name, model = FAMILIES[family][0], create(family)
    entry = model_entrypoint(name)
    assert entry.__name__ == name == safe_model_name(name)
    assert name in entry.__doc__
    cfg, keys = model.pretrained_cfg, model.state_dict()
    assert cfg["architecture"] == name
    assert f"{cfg['classifier']}.weight" in keys
    first = cfg["first_conv"] if isinstance(cfg["first_conv"], tuple) else (cfg["first_conv"],)
    assert all(keys[f"{conv}.weight"].shape[1] == 3 for conv in first)
    inputs = resolve_model_data_config(model)
    assert inputs["input_size"] == (3, 224, 224)
    assert (inputs["mean"], inputs["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (inputs["interpolation"], inputs["crop_pct"]) == ("bicubic", 1.0)
    with torch.device("meta"):
        features = timm.create_model(name).forward_features(torch.zeros(1, 3, 224, 224))
    assert (tuple(features.shape[2:]) if features.ndim == 4 else None) == cfg["pool_size"]


def count_runs(model: nn.Module) -> Counter:
    """How often each block is begun from now on, by its number."""
    blocks = [m for m in model.modules() if "Block" in type(m).__name__]
    runs = Counter(dict.fromkeys(range(len(blocks)), 0))
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: runs.update([i]))
    return runs


@pytest.mark.parametrize("family", NAMES)
def test_gradient_checkpointing_runs_blocks_again_and_changes_no_gradient(family):
    def gradients(checkpointing):
        model = create_random(family).train()
        model.set_grad_checkpointing(checkpointing)
        runs = count_runs(model)
        model(images()).square().sum().backward()
        assert set(runs.values()) == {2 if checkpointing else 1}
        return {n: p.grad for n, p in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert [n for n, g in plain.items() if g is None] == []
    torch.testing.assert_close(checkpointed, plain)
    assert any(g.abs().max() > 1e-6 for g in plain.values())


@pytest.mark.parametrize("family", NAMES)
def test_intermediates(family):
    model = create_random(family)
    x = images()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    assert len(info.channels()) >= 3
    features, maps = model.forward_intermediates(x)
    torch.testing.assert_close(features, model.forward_features(x))
    assert len(maps) == len(info.channels())
    for y, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert y.shape == (2, channels, 32 // reduction, 32 // reduction)
    tokens = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(tokens, [y.flatten(2).mT for y in maps])
    with pytest.raises((ValueError, AssertionError), match=r"NHWC|Output format"):
        model.forward_intermediates(x, output_fmt="NHWC")
    last = model.forward_intermediates(x, indices=[-1], intermediates_only=True)
    torch.testing.assert_close(last, maps[-1:])
    runs = count_runs(model)
    early = dict(indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(model.forward_intermediates(x, **early), maps[:1])
    assert list(runs.values()) == [1] + [0] * (len(runs) - 1)  # no block behind it
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x)[1], maps)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_intermediates_of_transformers(family):
    model = create_random(family, reg_tokens=2)
    x = images()
    with_prefix = model.forward_intermediates(
        x, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    assert [(y.shape, z.shape) for y, z in with_prefix] == [((2, 16, 32), (2, 3, 32))] * 4
    result = model.forward_intermediates(
        x, indices=2, return_prefix_tokens=True, norm=True, output_fmt="NLC", output_dict=True
    )
    assert set(result) == {"image_intermediates", "image_intermediates_prefix", "image_features"}
    torch.testing.assert_close(result["image_intermediates"], [y for y, _ in with_prefix[2:]])
    prefixes = result["image_intermediates_prefix"]
    torch.testing.assert_close(prefixes, [z for _, z in with_prefix[2:]])
    # the head reads the symmetric channels of the last normed features
    normed = torch.cat([with_prefix[-1][1], with_prefix[-1][0]], 1)[..., : model.num_features]
    torch.testing.assert_close(result["image_features"], normed)
    layers = model.get_intermediate_layers(x, n=2, return_prefix_tokens=True, norm=True)
    torch.testing.assert_close(list(layers), list(with_prefix[2:]))
    layers = model.get_intermediate_layers(x, n=2, reshape=True)
    torch.testing.assert_close(
        list(layers), model.forward_intermediates(x, indices=2, intermediates_only=True)
    )


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_the_class_token_is_first_and_is_classified(family):
    model = create_random(family, reg_tokens=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:  # no token sees another
                parameter.zero_()
    model(images()).square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "_token" in n}
    assert {n: bool(g.any()) for n, g in gradients.items()} == {n: "cls" in n for n in gradients}


@pytest.mark.parametrize("family", NAMES)
def test_features_only(family):
    """By default those of the last three steps at least; their values are those of
    `forward_intermediates`."""
    maps = create(family, features_only=True)(x32())
    assert len(maps) >= 3
    expected = create(family).forward_intermediates(x32(), intermediates_only=True)
    assert [y.shape for y in maps] == [y.shape for y in expected[-len(maps) :]]
    (only,) = create(family, features_only=True, out_indices=[-1])(x32())
    assert only.shape == maps[-1].shape


@pytest.mark.parametrize("family", NAMES)
def test_pruned_networks_give_the_same_features_and_use_all_they_keep(family):
    """timm's test_prune_intermediate_layers_contract."""
    model = create_random(family)
    x = images()
    maps = model.forward_intermediates(x, intermediates_only=True)
    last = len(maps) - 1
    whole = copy.deepcopy(model)
    whole.prune_intermediate_layers([last], prune_head=False)
    torch.testing.assert_close(whole(x), model(x))
    for i in range(last + 1):
        pruned = copy.deepcopy(model)
        kept = pruned.prune_intermediate_layers([i], prune_norm=True)
        (y,) = pruned.forward_intermediates(x, indices=kept, intermediates_only=True)
        torch.testing.assert_close(y, maps[i])
        (y.sum() + pruned.train().forward_features(x).square().sum()).backward()
        assert [n for n, p in pruned.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("family", NAMES)
def test_pruning_drops_norm_and_head_where_they_do_not_fit(family):
    """By default the head goes, and with it a norm of pooled features; a head of other channels
    than those of the last kept stage goes always."""
    headless, kept = create(family), create(family)
    headless.prune_intermediate_layers([0])
    assert (headless.num_classes, headless.global_pool) == (0, "")
    assert isinstance(headless.head, nn.Identity)
    assert isinstance(headless.norm, nn.Identity) == (family not in (*TRANSFORMERS, "resmlp"))
    kept.prune_intermediate_layers([0], prune_head=False)
    narrower = family == "d2_convnext"
    assert [isinstance(m, nn.Identity) for m in (kept.norm, kept.head)] == [narrower] * 2
    assert kept(x32()).shape == ((2, 8, 16, 16) if narrower else (2, 10))


# optimizers


@pytest.mark.parametrize("family", NAMES)
def test_parameter_groups_cover_every_parameter(family):
    model = create(family)
    names = [n for n, _ in model.named_parameters()]
    first = next(n for n in names if n.startswith(("patch_embed", "stem", "downsample_layers.0")))
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert set(groups) == set(names)
        assert len(set(groups.values())) > 3
        assert (groups[first], groups["head.weight"]) == (0, max(groups.values()))
    grouped = param_groups_layer_decay(
        model, weight_decay=0.1, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
    )
    by_scale = {id(p): g["lr_scale"] for g in grouped for p in g["params"]}
    assert len(by_scale) == len(names)
    assert by_scale[id(model.get_parameter(first))] < by_scale[id(model.head.weight)] == 1.0


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_embeddings_have_no_weight_decay(family):
    model = create(family, reg_tokens=1)
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1).param_groups
    free = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    embeddings = [p for n, p in model.named_parameters() if n.startswith(("pos_", "cls_", "reg_"))]
    assert len(embeddings) >= 3
    assert all(id(p) in free for p in embeddings)


@pytest.mark.parametrize("family", NAMES)
def test_frozen_networks_stay_frozen(family):
    model = create(family).requires_grad_(False)
    model.reset_classifier(0, "")
    if family in TRANSFORMERS:
        model.set_input_size(img_size=(64, 48), patch_size=4)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == []


# devices and dtypes


@pytest.mark.parametrize("family", NAMES)
def test_factory_device_and_dtype(family):
    model = create(family, device="meta", dtype=torch.bfloat16)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert [n for n, t in tensors if t.device.type != "meta"] == []
    assert {t.dtype for _, t in tensors} <= {torch.bfloat16, torch.int64}
    model.reset_classifier(0)
    model.reset_classifier(2)
    assert (model.head.weight.device.type, model.head.weight.dtype) == ("meta", torch.bfloat16)
    assert not model.head.training


@pytest.mark.parametrize("family", [f for f in NAMES if f not in ("deit", "resmlp")])
def test_initialisation_after_the_meta_device(family):
    """`init_weights` leaves nothing out: every tensor is written, buffers included."""
    model = create(family, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    model.init_weights()
    bad = [n for n, t in model.state_dict().items() if not torch.isfinite(t).all()]
    assert bad == []
    create(family).load_state_dict(model.state_dict())  # refuses wrong buffers
    assert torch.isfinite(model(x32())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", NAMES)
def test_half_precision(family, dtype):
    # the scale of a trained network: at the initial one the logits are near zero
    model = create_random(family).float()
    x = x32()
    expected = model(x)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
    assert (y.float() - expected).norm() < 0.1 * expected.norm()
    model.to(dtype)
    y = model(x.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("family", NAMES)
def test_channels_last(family):
    model = create_random(family)
    x = images()
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)
