"""Labels are the numbers that a network gives the classes, whatever folders there are."""

import json

import pytest
import torch
from timm.data import ImageNetInfo

from deit.data import match_classes, names_of_outputs, read_class_map
from deit.data.images import ArrayImages
from deit.errors import UserError

NAMES = ["ant", "bee", "cat"]


def make_data(*classes: str) -> ArrayImages:
    return ArrayImages(torch.zeros(3, 4, 4).byte().numpy(), (0, 1, 1), classes, "images")


def test_subsets_keep_their_numbers():
    data = make_data("bee", "cat")
    assert match_classes(data, NAMES, 3, origin="c.pth") == [
        "the data have 2 of the 3 classes of c.pth"
    ]
    assert data.targets.tolist() == [1, 2, 2]
    assert data.class_names == tuple(NAMES)
    assert match_classes(data, NAMES, 5, origin="c.pth") == []
    assert data.targets.tolist() == [1, 2, 2]


def test_where_names_come_from():
    assert names_of_outputs(["bee"], 3, source="c", saved=NAMES) == (NAMES, "c")
    imagenet = ImageNetInfo("imagenet-1k").label_names()
    names, origin = names_of_outputs(imagenet[500:502], 1000, source="c")
    assert list(names) == imagenet
    assert origin == "ImageNet-1K"
    for classes in (["a", "b"], [f"class {number}" for number in range(1000)]):
        assert names_of_outputs(classes, len(classes), source="c") == (classes, "c")


def test_classes_that_have_no_output():
    with pytest.raises(UserError, match=r"1 classes of the data \(dog\).*ant, bee, cat.*class-map"):
        match_classes(make_data("bee", "dog"), NAMES, 3, origin="c.pth")
    with pytest.raises(UserError, match="names 3 classes, but the network has 2 outputs"):
        match_classes(make_data("bee", "cat"), NAMES, 2, origin="c.pth")
    with pytest.raises(UserError, match=r"2 classes.*3 outputs.*--class-map FILE"):
        names_of_outputs(["a", "b"], 3, source="c")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("c.txt", "ant\nbee\n\ncat\n", NAMES),
        ("c.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish\n", ["n01440764", "n01443537"]),
        ("c.txt", "n01440764 tench\ngold fish\n", ["n01440764 tench", "gold fish"]),
        ("c.txt", "\ufeffant\nbee\ncat", NAMES),
        ("c.JSON", "\ufeff" + json.dumps(NAMES), NAMES),
        ("c.json", '{"cat": 2, "ant": 0, "bee": 1}', NAMES),
        ("c.json", json.dumps({str(n): [name, "words"] for n, name in enumerate(NAMES)}), NAMES),
    ],
)
def test_class_maps(name, text, expected, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_map(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ('{"a": 0, "b": 0}', "not those from 0 to 1, each once"),
        ('{"a": 0, "b": 2}', "not those from 0 to 1"),
        ("5", "cannot be read"),
        ('["a", "a"]', "has 'a' twice"),
        ("[]", "is empty"),
    ],
)
def test_wrong_class_maps_are_one_line(text, message, tmp_path):
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_class_map(tmp_path / "c.json")
    assert "\n" not in str(caught.value)
