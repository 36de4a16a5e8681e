"""Training and evaluation transforms, and mixup."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms as tv

from deit.data import eval_transform, train_transform
from deit.data.stream import seed_everything
from deit.data.transforms import build_three_augment, gaussian_blur
from deit.errors import UserError
from deit.train.args import parse_args
from deit.train.build import build_mixup, build_val_dataset


@pytest.fixture
def photo() -> Image.Image:
    """A smooth colour image with all grey levels, 80 x 60."""
    x, y = np.meshgrid(np.linspace(0, 255, 80), np.linspace(0, 255, 60))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def test_three_augment_is_one_of_three_equally_likely(photo):
    """Blurred by a radius between 0.1 and 2 pixels."""
    seed_everything(0)
    augment = build_three_augment()
    gray, solarized = photo.convert("L").convert("RGB"), ImageOps.solarize(photo, 128)
    names = {gray.tobytes(): "gray", solarized.tobytes(): "solarize"}
    counts = Counter(names.get(augment(photo).tobytes(), "blur") for _ in range(900))
    assert set(counts) == {"gray", "solarize", "blur"}
    # binomial(900, 1/3) has a standard deviation of 14
    assert all(abs(count - 300) < 60 for count in counts.values()), counts
    radii = []
    for _ in range(500):
        gaussian_blur(SimpleNamespace(filter=lambda kernel: radii.append(kernel.radius)))
    assert 0.1 <= min(radii) < 0.2
    assert 1.9 < max(radii) <= 2.0


def same(ours, theirs, image: Image.Image) -> bool:
    """Whether two transforms give the same under each of some seeds."""
    for seed in range(20):
        results = []
        for transform in (ours, theirs):
            seed_everything(seed)
            results.append(transform(image))
        if not torch.equal(*results):
            return False
    return True


STEPS = {
    "resized crop": "RandomResizedCropAndInterpolation",
    "resize": "Resize",
    "crop": "RandomCrop",
    "flip": "RandomHorizontalFlip",
    "three": "RandomChoice",
    "auto": "RandAugment",
    "policy": "AutoAugment",
    "mix": "AugMixAugment",
    "jitter": "ColorJitter",
}


class TestTrain:
    @pytest.mark.parametrize(
        ("size", "options", "steps"),
        [
            (33, {}, "resized crop, flip, auto"),
            (32, {}, "resize, crop, flip, auto"),  # small images keep most of what they show
            (64, {"auto_augment": None}, "resized crop, flip, jitter"),
            (64, {"auto_augment": None, "color_jitter": 0.0}, "resized crop, flip"),
            (64, {"auto_augment": None, "hflip": 0.0}, "resized crop, jitter"),
            (64, {"three_augment": True}, "resized crop, flip, three, jitter"),
            (32, {"three_augment": True}, "resized crop, flip, three, jitter"),
            (64, {"three_augment": True, "hflip": 0.0}, "resized crop, three, jitter"),
            (64, {"three_augment": True, "color_jitter": 0.0}, "resized crop, flip, three"),
            (64, {"three_augment": True, "simple_crop": True}, "resize, crop, flip, three, jitter"),
            (28, {"simple_crop": True, "auto_augment": "v0"}, "resize, crop, flip, policy"),
            (64, {"auto_augment": "augmix-m5-w4-d2"}, "resized crop, flip, mix"),
            (64, {"auto_augment": "", "interpolation": "random"}, "resized crop, flip, jitter"),
        ],
    )
    def test_steps_and_their_order(self, size, options, steps, photo):
        transform = train_transform(size, **options)
        *names, last = [type(step).__name__ for step in transform.transforms]
        assert names == [STEPS[step] for step in steps.split(", ")]
        assert last.endswith("PILToTensor")
        result = transform(photo)
        assert result.shape == (3, size, size)
        assert result.dtype == torch.uint8

    @pytest.mark.parametrize(
        "options",
        [
            {"auto_augment": "rand-m7-mstd0.5-inc1", "mean": (0.9, 0.1, 0.5), "hflip": 1.0},
            {"auto_augment": None, "color_jitter": 0.3, "interpolation": "bilinear"},
        ],
        ids=["policy", "jitter"],
    )
    def test_large_inputs_are_timms(self, options, photo):
        theirs = create_transform(
            64, is_training=True, normalize=False, **{"interpolation": "bicubic"} | options
        )
        assert same(train_transform(64, **options), theirs, photo)
        assert theirs.transforms[0].scale == (0.08, 1.0)

    @pytest.mark.parametrize(
        ("options", "padding_mode", "mode"),
        [
            ({"simple_crop": True}, "reflect", "BICUBIC"),
            ({"interpolation": "random"}, "constant", "BICUBIC"),
            ({"interpolation": "bilinear"}, "constant", "BILINEAR"),
        ],
    )
    def test_a_simple_crop_is_torchvisions(self, options, padding_mode, mode, photo):
        ours = train_transform(32, auto_augment=None, color_jitter=None, **options)
        theirs = [
            tv.Resize(32, tv.InterpolationMode[mode]),
            tv.RandomCrop(32, padding=4, padding_mode=padding_mode),
            tv.RandomHorizontalFlip(),
            tv.PILToTensor(),
        ]
        assert same(ours, tv.Compose(theirs), photo)

    @pytest.mark.parametrize(
        ("words", "name", "levels"),
        [
            ("rand-m10-n30-p1-inc1", "PosterizeIncreasing", (10, 5, 0)),
            ("v0", "Posterize", (0, 5, 10)),
        ],
    )
    def test_posterize_to_nothing_is_black(self, words, name, levels, photo):
        """To which magnitude 10 and `inc` come; the others leave two bits and four."""
        step = train_transform(64, auto_augment=words).transforms[2]
        operations = step.ops if hasattr(step, "ops") else chain.from_iterable(step.policy)
        posterize = next(op for op in operations if op.name == name)
        posterize.prob, posterize.magnitude_std = 1.0, 0
        black = Image.new("RGB", photo.size)
        expected = [black, ImageOps.posterize(photo, 2), ImageOps.posterize(photo, 4)]
        for posterize.magnitude, image in zip(levels, expected, strict=True):
            assert posterize(photo).tobytes() == image.tobytes()

    @pytest.mark.parametrize("wrong", ["rubbish", "rand-m9-q3", "3-m9"])
    def test_wrong_words(self, wrong):
        with pytest.raises(UserError, match=wrong):
            train_transform(64, auto_augment=wrong)
        with pytest.raises(UserError, match="'cubic': one of bicubic"):
            train_transform(64, interpolation="cubic")
        with pytest.raises(UserError, match="'random'"):
            eval_transform(64, interpolation="random")


class TestEval:
    @pytest.mark.parametrize(
        ("size", "options", "resized"),
        [
            (32, {}, 32),
            (224, {"crop_ratio": 0.875, "interpolation": "bilinear"}, 256),
            # the whole image, as ConvNeXt's published evaluation from 384 pixels on
            (32, {"crop_ratio": 0.875, "warp": True}, (32, 32)),
        ],
        ids=["whole", "cropped", "warped"],
    )
    def test_resize_and_centre_crop(self, photo, size, options, resized):
        mode = str_to_interp_mode(options.get("interpolation", "bicubic"))
        steps = [tv.Resize(resized, mode), tv.CenterCrop(size), tv.PILToTensor()]
        assert torch.equal(eval_transform(size, **options)(photo), tv.Compose(steps)(photo))

    def test_commutes_with_the_flip(self):
        """Mirrored test images are the mirror images of the test images, to the bit."""
        generator = np.random.default_rng(0)
        image = Image.fromarray(generator.integers(0, 256, (28, 28, 3), dtype=np.uint8))
        transform = eval_transform(32)
        assert torch.equal(transform(ImageOps.mirror(image)), transform(image).flip(-1))

    @pytest.mark.parametrize("ratio", [0, -1, 1.5])
    def test_wrong_ratio(self, ratio):
        with pytest.raises(UserError, match=str(ratio)):
            eval_transform(32, crop_ratio=ratio)

    @pytest.mark.parametrize(("size", "warped"), [(224, False), (383, False), (384, True)])
    def test_warping_begins_at_a_size(self, size, warped, photo):
        words = f"--crop-pct 0.875 --eval-warp-from 384 --input-size {size}"
        transform = build_val_dataset(parse_args(words.split())).transform
        expected = eval_transform(size, crop_ratio=0.875, warp=warped)(photo)
        assert torch.equal(transform(photo), expected)


class TestMixup:
    def test_options_arrive(self):
        words = "--mixup 0.3 --cutmix 0.6 --cutmix-minmax 0.2 0.8 --mixup-prob 0.7 --smoothing 0.2"
        words += " --mixup-switch-prob 0.4 --mixup-mode elem"
        mixup = build_mixup(parse_args(words.split()), 7)
        assert (mixup.mixup_alpha, mixup.cutmix_minmax) == (0.3, [0.2, 0.8])
        assert (mixup.mix_prob, mixup.switch_prob, mixup.mode) == (0.7, 0.4, "elem")
        images, targets = mixup(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 6]))
        assert images.shape == (4, 3, 8, 8)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        assert targets.min() == pytest.approx(0.2 / 7)

    @pytest.mark.parametrize(
        ("words", "active"),
        [
            ("--mixup 0 --cutmix 0", False),
            ("--mixup 0", True),
            ("--cutmix 0", True),
            ("--mixup 0 --cutmix 0 --cutmix-minmax 0.2 0.8", True),
        ],
    )
    def test_none_when_off(self, words, active):
        assert (build_mixup(parse_args(words.split()), 7) is not None) == active
