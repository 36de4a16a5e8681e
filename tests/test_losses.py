"""Losses against their formulas, written out here in plain operations; what teachers see."""

from argparse import Namespace

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from torch import nn
from training_runs import load, make_images, train

from deit.errors import UserError
from deit.train.args import parse_args
from deit.train.losses import build_criterion
from deit.train.teacher import Teacher, build_teacher

CLASSES = 7
MEAN, STD = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
PIXELS = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1).expand(6, 3, 32, 32)
IMAGES = (PIXELS - MEAN) / STD


def criterion_of(mixup=False, teacher=None, **options):
    args = vars(parse_args(["--smoothing", "0"])) | options
    return build_criterion(Namespace(**args), mixup=mixup, teacher=teacher)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, CLASSES, generator=generator)
    return logits, torch.randint(CLASSES, (6,), generator=generator)


def one_hot(targets):
    return torch.eye(CLASSES)[targets]


def bce(logits, targets):
    p = logits.double().sigmoid()
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()


def mixed(targets):
    return 0.3 * one_hot(targets) + 0.7 * one_hot(targets).flip(0)


def test_cross_entropy_plain_smoothed_and_soft(batch):
    logits, targets = batch
    for given, dense, options in (
        (targets, one_hot(targets), {}),
        (targets, one_hot(targets) * 0.9 + 0.1 / CLASSES, {"smoothing": 0.1}),
        (mixed(targets), mixed(targets), {"mixup": True, "smoothing": 0.1}),
    ):
        expected = -(dense * logits.log_softmax(1)).sum(1).mean()
        criterion = criterion_of(**options)
        torch.testing.assert_close(criterion(logits, given), expected)
        assert criterion(logits.bfloat16(), given).dtype == torch.float32


def test_bce_binarises_mixed_targets(batch):
    logits, targets = batch
    both = (one_hot(targets) + one_hot(targets).flip(0)).clamp(max=1)
    criterion = criterion_of(bce_loss=True, mixup=True)
    loss = criterion(logits, mixed(targets))
    torch.testing.assert_close(loss.double(), bce(logits, both))
    assert abs(loss - bce(logits, mixed(targets))) > 1e-3, "soft targets would give another loss"
    loss = criterion(logits, targets)
    torch.testing.assert_close(loss.double(), bce(logits, one_hot(targets)))
    assert criterion(logits.bfloat16(), targets).dtype == torch.float32


@pytest.mark.parametrize("binarise", [False, True])
def test_cosub_is_the_mean_of_four_losses_and_detaches_the_other(batch, binarise):
    logits, targets = batch
    dense = mixed(targets)
    goal = (dense > 0).double() if binarise else dense
    criterion = criterion_of(cosub=True, bce_loss=binarise, mixup=True)
    outputs = torch.cat([logits, logits.flip(1) * 0.5]).requires_grad_()
    x, y = outputs.chunk(2)
    parts = [bce(x, goal), bce(y, goal)]
    parts += [bce(x, y.detach().sigmoid()), bce(y, x.detach().sigmoid())]
    loss, expected = criterion(outputs, dense), sum(parts) / 4
    torch.testing.assert_close(loss.double(), expected)
    gradients = [torch.autograd.grad(each, outputs)[0] for each in (loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)
    images = torch.randn(6, 3, 2, 2)
    assert torch.equal(criterion.network_input(images), torch.cat([images, images]))


class Fixed(nn.Module):
    """A teacher that always answers the same, and remembers what it was shown."""

    pretrained_cfg = {  # noqa: RUF012
        "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
        "input_size": (3, 16, 16), "fixed_input_size": True,
    }  # fmt: skip

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        self.seen = images
        return self.logits


@pytest.mark.parametrize("two_outputs", [False, True])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation(batch, kind, two_outputs):
    """The teacher is renormalised, resampled and frozen."""
    logits, targets = batch
    distilled = logits.flip(0) if two_outputs else logits
    answers = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(1))
    teacher = Teacher(Fixed(answers), MEAN.flatten().tolist(), STD.flatten().tolist())
    options = {"distillation_type": kind, "distillation_alpha": 0.3, "distillation_tau": 2.0}
    criterion = criterion_of(teacher=teacher, **options).train()
    loss = criterion((logits, distilled) if two_outputs else logits, targets, IMAGES)
    base = -(one_hot(targets) * logits.log_softmax(1)).sum(1).mean()
    if kind == "hard":
        distance = -distilled.log_softmax(1)[torch.arange(6), answers.argmax(1)].mean()
    else:
        p, q = (answers / 2).log_softmax(1), (distilled / 2).log_softmax(1)
        distance = (p.exp() * (p - q)).mean() * 4
    torch.testing.assert_close(loss, 0.7 * base + 0.3 * distance)
    torch.testing.assert_close(teacher.model.seen, (PIXELS[..., :16, :16] - 0.5) / 0.5)
    assert not teacher.model.training
    assert not any(p.requires_grad for p in criterion.parameters())


def test_a_teacher_of_other_classes_is_refused(batch):
    criterion = criterion_of(teacher=Fixed(torch.zeros(6, 9)), distillation_type="soft")
    with pytest.raises(UserError, match=r"teacher gives 9 classes, the student 7"):
        criterion(*batch, IMAGES)


def teacher_of(name, path="", *words):
    args = parse_args(["--teacher-model", name, "--teacher-path", str(path), *words])
    return build_teacher(args, CLASSES, "cpu")


def test_a_teacher_that_was_trained_here_is_built_as_it_was(tmp_path):
    """Its patches and images are smaller than its name says; the student's images are larger."""
    name = "vit_tiny_patch16_224"
    source = timm.create_model(name, num_classes=CLASSES, img_size=16, patch_size=8, depth=12)
    args = Namespace(model=name, input_size=16, patch_size=8, drop_path=0.3)
    torch.save({"model": source.state_dict(), "args": args}, tmp_path / "teacher.pth")
    # timm's ViT wants a mean and a deviation of 0.5.
    as_wanted = (PIXELS - 0.5) / 0.5
    expected = source.eval()(as_wanted[..., :16, :16])
    for images, words in ((IMAGES, ()), (as_wanted, ["--no-imagenet-default-mean-and-std"])):
        teacher = teacher_of(name, tmp_path / "teacher.pth", *words)
        assert not teacher(images).requires_grad
        torch.testing.assert_close(teacher(images), expected, atol=1e-4, rtol=1e-4)


def test_a_teacher_trains_the_output_that_a_student_has_for_it(tmp_path):
    teacher = timm.create_model("test_vit", img_size=32, num_classes=3)
    args = Namespace(model="test_vit", input_size=32)
    torch.save({"model": teacher.state_dict(), "args": args}, tmp_path / "teacher.pth")
    words = ("--model", "deit_tiny_distilled_patch16_224", "--model-kwargs", "depth=1")
    words += ("--distillation-type", "soft", "--distillation-alpha", "1", "--epochs", "1")
    words += ("--teacher-model", "test_vit", "--teacher-path", str(tmp_path / "teacher.pth"))
    assert train(*words, data=make_images(tmp_path / "data"), out=tmp_path / "out") == 0
    saved = load(tmp_path / "out" / "checkpoint.pth")
    state = saved["optimizer"]["state"]
    moments = {name: state[n]["exp_avg"] for n, name in enumerate(saved["parameters"])}
    assert moments["head_dist.weight"].any()
    assert not moments["head.weight"].any(), "all of the loss is the teacher's"


def test_build_teacher_says_what_is_wrong(tmp_path):
    for name, path, words in (
        ("resnet10tt", "", r"unknown teacher 'resnet10tt'; did you mean .*resnet10t"),
        ("resnet10t", "", r"for 1000 classes .* 7 classes are needed.*--teacher-path"),
        ("resnet10t", tmp_path / "absent.pth", "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            teacher_of(name, path)
