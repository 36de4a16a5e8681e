"""Every kind of image becomes 8-bit RGB without a loss that nobody sees."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from deit.data.images import read_rgb, to_rgb

RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
GREY = np.rint(RAMP / 257).astype(np.uint8)


def stored(image: Image.Image, kind: str, **options) -> Image.Image:
    """`image` written as `kind` and read as a data set reads it."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return read_rgb(file)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("PNG", RAMP),
        ("TIFF", RAMP),
        ("PPM", RAMP.astype(np.int32)),
        ("TIFF", RAMP.astype(np.int32) * 2**15),
        ("TIFF", RAMP.astype(np.int32) - 2**15),
        ("TIFF", RAMP.astype(np.float32)),
        ("TIFF", RAMP.astype(np.float32) / 65535),
        ("TIFF", RAMP.astype(np.float32) * -1e30 + 5e34),
    ],
)
def test_deep_grey_keeps_its_levels(kind, values):
    expected = 255 - GREY if values[-1, -1] < values[0, 0] else GREY
    image = stored(Image.fromarray(values), kind)
    assert image.mode == "RGB"
    difference = np.asarray(image).astype(int) - expected[..., None]
    assert abs(difference).max() <= 1


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bits_have_one_scale_for_all_images(mode):
    """Whatever the brightest pixel, and in both byte orders."""
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (2, 2), np.array([0, 257, 514, 5140], order).tobytes())
    assert np.asarray(to_rgb(image))[..., 0].tolist() == [[0, 1], [2, 20]]


def test_a_dark_pgm_and_a_dark_png_are_dark():
    for kind, dtype in (("PPM", np.int32), ("PNG", np.uint16)):
        image = stored(Image.fromarray(np.full((2, 2), 2570, dtype)), kind)
        assert image.getpixel((0, 0)) == (10, 10, 10)


def test_constant_float_and_values_that_are_none():
    assert to_rgb(Image.new("F", (2, 2), 7.5)).getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(ValueError, match="infinite or not a number"):
        stored(Image.new("F", (2, 2), float("nan")), "TIFF")


def test_16_bit_colour_keeps_its_levels():
    """Pillow cannot write it: the file is made by hand."""
    colours = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)
    header = b"P6 8 8 65535\n"
    image = read_rgb(io.BytesIO(header + colours.astype(">u2").tobytes()))
    assert abs(np.asarray(image).astype(int) - colours / 257).max() <= 1


class TestTransparency:
    @pytest.mark.parametrize(
        ("mode", "colours"),
        [
            ("RGBA", ((200, 0, 0, 0), (200, 0, 0, 255), (200, 0, 0, 128))),
            ("RGBa", ((0, 0, 0, 0), (200, 0, 0, 255), (100, 0, 0, 128))),
        ],
    )
    def test_shows_white(self, mode, colours):
        image = Image.new(mode, (3, 1))
        for x, colour in enumerate(colours):
            image.putpixel((x, 0), colour)
        clear, solid, half = (to_rgb(image).getpixel((x, 0)) for x in range(3))
        assert clear == (255, 255, 255)
        assert solid == (200, 0, 0)
        assert np.abs(np.subtract(half, (227, 127, 127))).max() <= 1

    @pytest.mark.parametrize("mode", ["LA", "La", "PA"])
    def test_of_grey_and_palette(self, mode):
        image = Image.new("PA" if mode == "PA" else "LA", (2, 1), (90, 255))
        image.putpixel((1, 0), (90, 0))
        if mode == "PA":
            image.putpalette([level for index in range(256) for level in (index,) * 3])
        result = to_rgb(image if mode == "PA" else image.convert(mode))
        assert result.getpixel((0, 0)) == (90, 90, 90)
        assert result.getpixel((1, 0)) == (255, 255, 255)

    @pytest.mark.parametrize("mode", ["P", "L", "RGB"])
    def test_by_one_colour_of_a_png(self, mode):
        image = Image.new(mode, (2, 1))
        if mode == "P":
            image.putpalette([9, 9, 9, 80, 80, 80])
        image.putpixel((1, 0), {"P": 1, "L": 80, "RGB": (80, 80, 80)}[mode])
        image = stored(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((1, 0)) == (80, 80, 80)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_as_pillow_converts_them(mode):
    generator = np.random.default_rng(0)
    source = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    image = Image.new("LAB", (8, 8), (50, 9, 9)) if mode == "LAB" else source.convert(mode)
    assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()


def test_opaque_pixels_are_untouched_and_orientation_is_not_applied():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (8, 6, 3), dtype=np.uint8))
    assert to_rgb(image) is image
    assert to_rgb(image.convert("RGBA")).tobytes() == image.tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert stored(image, "PNG", exif=exif).size == image.size
