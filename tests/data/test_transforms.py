"""Training and evaluation transforms, and mixup."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import create_transform
from torchvision import transforms as tv

from deit.data import build_mixup, eval_transform, train_transform
from deit.data.stream import seed_everything
from deit.data.transforms import build_three_augment
from deit.errors import UserError
from deit.train.args import parse_args
from deit.train.build import build_val_dataset


@pytest.fixture
def photo() -> Image.Image:
    """A smooth colour image with all grey levels, 80 x 60."""
    x, y = np.meshgrid(np.linspace(0, 255, 80), np.linspace(0, 255, 60))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


class TestThreeAugment:
    def kind(self, image: Image.Image, result: Image.Image) -> str:
        if result.tobytes() == image.convert("L").convert("RGB").tobytes():
            return "gray"
        if result.tobytes() == ImageOps.solarize(image, 128).tobytes():
            return "solarize"
        return "blur"

    def test_one_of_three_equally_likely(self, photo):
        seed_everything(0)
        augment = build_three_augment()
        counts = Counter(self.kind(photo, augment(photo)) for _ in range(900))
        assert set(counts) == {"gray", "solarize", "blur"}
        # binomial(900, 1/3) has a standard deviation of 14
        assert all(abs(count - 300) < 60 for count in counts.values()), counts

    def test_blur_radius(self, photo):
        random.seed(0)
        radii = []

        class Spy(Image.Image):
            def filter(self, kernel: ImageFilter.GaussianBlur) -> Image.Image:
                radii.append(kernel.radius)
                return photo

        blur = build_three_augment().transforms[2]
        for _ in range(500):
            blur(Spy())
        assert 0.1 <= min(radii) < 0.2
        assert 1.9 < max(radii) <= 2.0


STEPS = {
    "resized crop": "RandomResizedCropAndInterpolation",
    "resize": "Resize",
    "crop": "RandomCrop",
    "flip": "RandomHorizontalFlip",
    "three": "RandomChoice",
    "auto": "RandAugment",
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
        ],
    )
    def test_steps_and_their_order(self, size, options, steps):
        *names, last = [type(step).__name__ for step in train_transform(size, **options).transforms]
        assert names == [STEPS[step] for step in steps.split(", ")]
        assert last.endswith("PILToTensor")

    def test_options_of_the_steps(self):
        crop, flip, _, jitter, _ = train_transform(64, three_augment=True, hflip=1.0).transforms
        assert crop.scale == (0.08, 1.0)
        assert "bicubic" in repr(crop)
        assert flip.p == 1.0
        assert jitter.brightness == jitter.contrast == jitter.saturation == (0.7, 1.3)
        assert jitter.hue is None
        assert train_transform(64, hflip=1.0).transforms[1].p == 1.0
        _, simple, *_ = train_transform(64, three_augment=True, simple_crop=True).transforms
        assert (simple.padding, simple.padding_mode) == (4, "reflect")

    @pytest.mark.parametrize("size", [28, 32, 64])
    @pytest.mark.parametrize("three_augment", [False, True])
    @pytest.mark.parametrize("simple_crop", [False, True])
    @pytest.mark.parametrize("auto_augment", ["", "rand-m9-mstd0.5-inc1", "v0", "augmix-m5-w4-d2"])
    def test_uint8_of_the_size(self, photo, size, three_augment, simple_crop, auto_augment):
        transform = train_transform(
            size,
            three_augment=three_augment,
            simple_crop=simple_crop,
            auto_augment=auto_augment,
        )
        for _ in range(3):
            result = transform(photo)
            assert result.shape == (3, size, size)
            assert result.dtype == torch.uint8

    def test_large_inputs_are_timms(self, photo):
        ours = train_transform(64, auto_augment="rand-m7-mstd0.5-inc1", interpolation="bilinear")
        theirs = create_transform(
            64,
            is_training=True,
            auto_augment="rand-m7-mstd0.5-inc1",
            interpolation="bilinear",
            normalize=False,
        )
        for seed in range(20):
            results = []
            for transform in (ours, theirs):
                seed_everything(seed)
                results.append(transform(photo))
            assert torch.equal(*results), seed

    def test_posterize_to_nothing_is_black(self, photo):
        # magnitude 10 and `inc` leave zero bits
        transform = train_transform(64, auto_augment="rand-m10-n30-p1-inc1")
        operations = transform.transforms[2].ops
        posterize = next(op for op in operations if op.name == "PosterizeIncreasing")
        posterize.prob = 1.0
        assert np.asarray(posterize(photo)).max() == 0
        posterize.magnitude = 5
        expected = ImageOps.posterize(photo, 2)
        assert posterize(photo).tobytes() == expected.tobytes()

    @pytest.mark.parametrize("wrong", ["rubbish", "rand-m9-q3", "3-m9"])
    def test_wrong_auto_augment(self, wrong):
        with pytest.raises(UserError, match=wrong):
            train_transform(64, auto_augment=wrong)

    def test_wrong_interpolation(self):
        with pytest.raises(UserError, match="'cubic': one of bicubic"):
            train_transform(64, interpolation="cubic")
        with pytest.raises(UserError, match="'random'"):
            eval_transform(64, interpolation="random")

    def test_random_interpolation(self, photo):
        transform = train_transform(64, interpolation="random", auto_augment="")
        assert transform(photo).shape == (3, 64, 64)


class TestEval:
    @pytest.mark.parametrize(("size", "ratio"), [(32, 1.0), (32, 0.875), (224, 0.875), (64, 0.9)])
    def test_resize_and_centre_crop(self, photo, size, ratio):
        expected = tv.Compose(
            [
                tv.Resize(int(size / ratio), interpolation=tv.InterpolationMode.BICUBIC),
                tv.CenterCrop(size),
                tv.PILToTensor(),
            ]
        )
        assert torch.equal(eval_transform(size, crop_ratio=ratio)(photo), expected(photo))

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

    def test_warping_keeps_the_whole_image(self, photo):
        """As ConvNeXt's published evaluation from 384 pixels on."""
        size = (32, 32)
        expected = tv.Compose([tv.Resize(size, tv.InterpolationMode.BICUBIC), tv.PILToTensor()])
        made = eval_transform(32, crop_ratio=0.875, warp=True)(photo)
        assert torch.equal(made, expected(photo))
        assert not torch.equal(made, eval_transform(32, crop_ratio=0.875)(photo))

    @pytest.mark.parametrize(("size", "warped"), [(224, False), (383, False), (384, True)])
    def test_warping_begins_at_a_size(self, size, warped, photo):
        args = parse_args(
            ["--crop-pct", "0.875", "--eval-warp-from", "384", "--input-size", str(size)]
        )
        transform = build_val_dataset(args).transform
        assert torch.equal(
            transform(photo), eval_transform(size, crop_ratio=0.875, warp=warped)(photo)
        )


class TestMixup:
    def test_options_arrive(self):
        mixup = build_mixup(parse_args([]), 7)
        assert (mixup.mixup_alpha, mixup.cutmix_alpha) == (0.8, 1.0)
        assert (mixup.mix_prob, mixup.switch_prob, mixup.mode) == (1.0, 0.5, "batch")
        images, targets = mixup(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 6]))
        assert images.shape == (4, 3, 8, 8)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        assert targets.min() == pytest.approx(0.1 / 7)

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
