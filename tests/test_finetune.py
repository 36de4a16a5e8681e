"""Loading weights exactly, for another resolution or for other classes."""

from argparse import Namespace

import pytest
import timm
import torch
from torch import nn

import deit.models  # noqa: F401 - registers the networks
from deit.errors import UserError
from deit.train.checkpoint import Checkpoint
from deit.train.weights import classifier_names, load_weights

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
EQUIVARIANT = "d2_deit_tiny_patch16_LS"
NAMES = ["vit_tiny_patch16_224", "deit_tiny_patch16_LS", EQUIVARIANT]


def make(name, seed=0, img_size=32, num_classes=5, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model(
        name, img_size=img_size, num_classes=num_classes, **(SMALL | kwargs)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    return model


def adapt(model, state):
    return load_weights(model, Checkpoint({"model": state}, "weights.pth"), adapt=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_network_and_another_number_of_classes(name):
    trained, fresh, other = make(name), make(name, seed=1), make(name, seed=1, num_classes=7)
    images, state = torch.randn(2, 3, 32, 32), trained.state_dict()
    assert not torch.allclose(trained(images), fresh(images))
    assert str(adapt(fresh, state)) == f"{len(state)} tensors loaded"
    assert torch.equal(trained(images), fresh(images))

    head = {key: value.clone() for key, value in other.state_dict().items() if "head." in key}
    report = adapt(other, state)
    assert report.reinitialised == ["head.bias", "head.weight"]
    assert report.missing == report.unexpected == []
    assert "2 initialised anew (head.bias, head.weight)" in str(report)
    assert torch.equal(other.forward_features(images), trained.forward_features(images))
    assert all(torch.equal(other.state_dict()[key], value) for key, value in head.items())


@pytest.mark.parametrize("name", NAMES)
def test_another_resolution(name):
    trained, fresh = make(name), make(name, seed=1, img_size=64)
    state = trained.state_dict()
    report = adapt(fresh, state)
    assert report.adapted
    assert all("pos_embed" in key or "permutation" in key for key in report.adapted)
    assert report.reinitialised == report.missing == []
    assert torch.equal(fresh.head.weight, trained.head.weight)
    if name == EQUIVARIANT:
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(fresh(images.flip(-1)), fresh(images), atol=1e-5, rtol=1e-5)
        assert (fresh(images)[0] - fresh(images)[1]).abs().max() > 1e-3
        # Resampling is exact where nothing varies; the first rows would show a wrong order.
        row = torch.arange(12.0)
        adapt(fresh, state | {"pos_embed.0": row.expand_as(state["pos_embed.0"]).clone()})
        torch.testing.assert_close(fresh.state_dict()["pos_embed.0"], row.expand(1, 32, 12))


def test_what_is_missing_or_unexpected_is_reported():
    key = "blocks.1.attn.qkv.bias"
    state, fresh = make(NAMES[0]).state_dict(), make(NAMES[0], seed=1)
    del state[key]
    state["decoder.weight"] = torch.ones(3)
    kept = fresh.state_dict()[key].clone()
    report = adapt(fresh, state)
    assert (report.missing, report.unexpected) == ([key], ["decoder.weight"])
    assert torch.equal(fresh.state_dict()[key], kept)


FOREIGN = {f"layer.{number}": torch.ones(2) for number in range(5)}


@pytest.mark.parametrize(
    ("state", "exact", "words"),
    [
        (lambda: FOREIGN, False, r"of another network, 0 tensors fit, .*layer"),
        (dict, False, r"of another network, 0 tensors fit"),
        (lambda: make(NAMES[1]).state_dict(), False, "another network"),
        (lambda: make(EQUIVARIANT, embed_dim=48).state_dict(), False,
         r"proj_sym.bias \[24\] and not \[12\]"),
        (lambda: FOREIGN | {"head.bias": torch.ones(5)}, True,
         r"missing keys \(patch_embed.*5 unexpected keys \(layer.0, layer.1, layer.2, ...\)"
         r".* from model 'a_net'"),
        (lambda: make(EQUIVARIANT, num_classes=4).state_dict(), True,
         r"2 tensors of another shape \(head.weight \[4, 12\] and not \[5, 12\]"),
    ],
    ids=["foreign", "empty", "ordinary", "wider", "exact", "classes"],
)  # fmt: skip
def test_what_does_not_fit_is_one_clear_error_and_changes_nothing(state, exact, words):
    model = make(EQUIVARIANT)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    checkpoint = Checkpoint({"model": state(), "args": Namespace(model="a_net")}, "weights.pth")
    with pytest.raises(UserError, match=rf"^[^\n]*'weights.pth' [^\n]*{words}[^\n]*$"):
        load_weights(model, checkpoint, adapt=not exact)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_networks_without_a_filter_of_their_own():
    """The classifier is what the network says it is; of a distilled one both are."""

    class Plain(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.body, self.last = nn.Linear(3, 4), nn.Linear(4, classes)

        def get_classifier(self):
            return self.last

    trained, fresh = Plain(5), Plain(6)
    report = adapt(fresh, trained.state_dict())
    assert report.reinitialised == ["last.bias", "last.weight"]
    assert torch.equal(fresh.body.weight, trained.body.weight)
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    names = {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert classifier_names(distilled) == names
