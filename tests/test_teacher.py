"""Teachers see what they were trained on, and do not learn."""

from argparse import Namespace

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from torch import nn

from deit.errors import UserError
from deit.train.args import parse_args
from deit.train.losses import build_criterion
from deit.train.teacher import Teacher, build_teacher

CLASSES = 7


class Fixed(nn.Module):
    """A network that always answers zero, and remembers what it was shown."""

    pretrained_cfg = {  # noqa: RUF012
        "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
        "input_size": (3, 16, 16), "fixed_input_size": True,
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        self.seen = images
        return images.new_zeros(len(images), CLASSES)


def test_teacher_renormalises_resamples_and_stays_frozen():
    model = Fixed()
    mean, std = torch.tensor([0.4, 0.45, 0.5]), torch.tensor([0.2, 0.25, 0.3])
    teacher = Teacher(model, mean.tolist(), std.tolist())
    criterion = build_criterion(
        parse_args(["--distillation-type", "hard"]), mixup=False, teacher=teacher
    )
    criterion.train()
    pixels = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    images = (pixels - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    criterion(torch.zeros(2, CLASSES), torch.tensor([0, 1]), images)
    expected = (pixels[..., :16, :16] - 0.5) / 0.5
    torch.testing.assert_close(model.seen, expected)
    assert not model.training
    assert not any(p.requires_grad for p in criterion.parameters())


def teacher_of(name, path="", *words, class_names=(), classes=CLASSES):
    args = parse_args(["--teacher-model", name, "--teacher-path", str(path), *words])
    return build_teacher(args, classes, "cpu", class_names)


def test_a_teacher_that_was_trained_here_is_built_as_it_was(tmp_path):
    """Its patches and images are smaller than its name says; the student's images are larger."""
    name = "vit_tiny_patch16_224"
    source = timm.create_model(name, num_classes=CLASSES, img_size=16, patch_size=8, depth=12)
    args = Namespace(model=name, input_size=16, patch_size=8, drop_path=0.3)
    torch.save({"model": source.state_dict(), "args": args}, tmp_path / "teacher.pth")
    pixels = torch.rand(2, 3, 1, 1).expand(2, 3, 32, 32)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    # timm's ViT wants a mean and a deviation of 0.5.
    as_wanted = (pixels - 0.5) / 0.5
    expected = source.eval()(as_wanted[..., :16, :16])
    for images, words in (
        ((pixels - mean) / std, ()),
        (as_wanted, ["--no-imagenet-default-mean-and-std"]),
    ):
        teacher = teacher_of(name, tmp_path / "teacher.pth", *words)
        assert not teacher(images).requires_grad
        torch.testing.assert_close(teacher(images), expected, atol=1e-4, rtol=1e-4)


def test_build_teacher_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"unknown teacher 'resnet10tt'; did you mean .*resnet10t"):
        teacher_of("resnet10tt")
    with pytest.raises(
        UserError, match=r"for 1000 classes .* 7 classes are needed.*--teacher-path"
    ):
        teacher_of("resnet10t")
    with pytest.raises(UserError, match="does not exist"):
        teacher_of("resnet10t", tmp_path / "absent.pth")
