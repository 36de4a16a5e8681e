"""Losses against their formulas, written out here in plain operations."""

from argparse import Namespace

import pytest
import timm
import torch
from torch import nn

from deit.errors import UserError
from deit.train.args import parse_args
from deit.train.losses import build_criterion, prepare_student

CLASSES = 7


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


def mixed(targets, smoothing=0.0):
    dense = one_hot(targets) * (1 - smoothing) + smoothing / CLASSES
    return 0.3 * dense + 0.7 * dense.flip(0)


def test_cross_entropy_plain_smoothed_and_soft(batch):
    logits, targets = batch
    log_p = logits.log_softmax(1)
    plain = -(one_hot(targets) * log_p).sum(1).mean()
    smoothed = -((one_hot(targets) * 0.9 + 0.1 / CLASSES) * log_p).sum(1).mean()
    soft = -(mixed(targets) * log_p).sum(1).mean()
    torch.testing.assert_close(criterion_of()(logits, targets), plain)
    torch.testing.assert_close(criterion_of(smoothing=0.1)(logits, targets), smoothed)
    torch.testing.assert_close(criterion_of(mixup=True)(logits, mixed(targets)), soft)
    assert abs(plain - smoothed) > 1e-3


def test_bce_binarises_mixed_targets(batch):
    logits, targets = batch
    both = (one_hot(targets) + one_hot(targets).flip(0)).clamp(max=1)
    criterion = criterion_of(bce_loss=True, mixup=True)
    loss = criterion(logits, mixed(targets))
    torch.testing.assert_close(loss.double(), bce(logits, both))
    assert abs(loss - bce(logits, mixed(targets))) > 1e-3, "soft targets would give another loss"
    loss = criterion(logits, targets)
    torch.testing.assert_close(loss.double(), bce(logits, one_hot(targets)))


@pytest.mark.parametrize("binarise", [False, True])
def test_cosub_is_the_mean_of_four_losses(batch, binarise):
    x, targets = batch
    y = x.flip(1) * 0.5
    dense = mixed(targets)
    goal = (dense > 0).double() if binarise else dense
    parts = [bce(x, goal), bce(y, goal), bce(x, y.sigmoid()), bce(y, x.sigmoid())]
    loss = criterion_of(cosub=True, bce_loss=binarise, mixup=True)(torch.cat([x, y]), dense)
    torch.testing.assert_close(loss.double(), sum(parts) / 4)


def test_cosub_gives_each_image_twice_and_detaches_the_other(batch):
    logits, targets = batch
    criterion = criterion_of(cosub=True)
    images = torch.randn(6, 3, 2, 2)
    assert torch.equal(criterion.network_input(images), torch.cat([images, images]))
    outputs = torch.cat([logits, logits * 2]).requires_grad_()
    (grad,) = torch.autograd.grad(criterion(outputs, targets), outputs)
    x, y = logits.double(), 2 * logits.double()
    expected = ((x.sigmoid() - one_hot(targets)) + (x.sigmoid() - y.sigmoid())) / (4 * x.numel())
    torch.testing.assert_close(grad[:6].double(), expected, atol=1e-7, rtol=1e-5)


class Fixed(nn.Module):
    """A teacher that always answers the same, and remembers what it was shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.seen = None

    def forward(self, images):
        self.seen = images
        return self.logits


@pytest.mark.parametrize("two_outputs", [False, True])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation(batch, kind, two_outputs):
    logits, targets = batch
    distilled = logits.flip(0) if two_outputs else logits
    teacher = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(1))
    criterion = criterion_of(
        teacher=Fixed(teacher), distillation_type=kind, distillation_alpha=0.3, distillation_tau=2.0
    )
    images = torch.randn(6, 3, 2, 2)
    loss = criterion((logits, distilled) if two_outputs else logits, targets, images)
    base = -(one_hot(targets) * logits.log_softmax(1)).sum(1).mean()
    if kind == "hard":
        distance = -distilled.log_softmax(1)[torch.arange(6), teacher.argmax(1)].mean()
    else:
        p, q = (teacher / 2).log_softmax(1), (distilled / 2).log_softmax(1)
        distance = (p.exp() * (p - q)).mean() * 4
    torch.testing.assert_close(loss, 0.7 * base + 0.3 * distance)
    assert criterion.teacher.seen is images


def test_a_teacher_of_other_classes_is_refused(batch):
    logits, targets = batch
    criterion = criterion_of(teacher=Fixed(torch.zeros(6, 9)), distillation_type="soft")
    with pytest.raises(UserError, match=r"teacher gives 9 classes, the student 7"):
        criterion(logits, targets, torch.zeros(6, 3, 2, 2))


def test_a_network_with_a_distillation_token_returns_both():
    student = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=CLASSES)
    prepare_student(student)
    outputs = student.train()(torch.randn(2, 3, 32, 32))
    teacher = Fixed(torch.randn(2, CLASSES))
    criterion = criterion_of(teacher=teacher, distillation_type="soft")
    criterion(outputs, torch.tensor([0, 1]), torch.zeros(2, 3, 32, 32)).backward()
    assert student.head.weight.grad.abs().sum() > 0
    assert student.head_dist.weight.grad.abs().sum() > 0


def test_losses_of_half_precision_outputs_are_float32(batch):
    logits, targets = batch
    for options in ({}, {"bce_loss": True}, {"smoothing": 0.1}):
        loss = criterion_of(**options)(logits.bfloat16(), targets)
        assert loss.dtype == torch.float32
