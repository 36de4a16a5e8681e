"""Every kind of image becomes 8-bit RGB without a loss that nobody sees."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from deit.data.images import read_rgb, to_rgb

RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)


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
    levels = RAMP[::-1, ::-1] if values[-1, -1] < values[0, 0] else RAMP
    image = stored(Image.fromarray(values), kind)
    assert image.mode == "RGB"
    assert abs(np.asarray(image).astype(int) - levels[..., None] / 257).max() <= 1


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bits_have_one_scale_for_all_images(mode):
    """Whatever the brightest pixel, and in both byte orders."""
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (2, 2), np.array([0, 257, 514, 5140], order).tobytes())
    assert np.asarray(to_rgb(image))[..., 0].tolist() == [[0, 1], [2, 20]]


@pytest.mark.parametrize(("kind", "dtype"), [("PPM", np.int32), ("PNG", np.uint16)])
def test_a_dark_file_is_dark(kind, dtype):
    image = stored(Image.fromarray(np.full((2, 2), 2570, dtype)), kind)
    assert image.getpixel((0, 0)) == (10, 10, 10)


def test_constant_float_and_values_that_are_none():
    assert to_rgb(Image.new("F", (2, 2), 7.5)).getpixel((0, 0)) == (0, 0, 0)
    for value in ("nan", "inf"):
        with pytest.raises(ValueError, match="infinite or not a number"):
            stored(Image.new("F", (2, 2), float(value)), "TIFF")


def test_16_bit_colour_keeps_its_levels():
    """Pillow cannot write it: the file is made by hand."""
    colours = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)
    header = b"P6 8 8 65535\n"
    image = read_rgb(io.BytesIO(header + colours.astype(">u2").tobytes()))
    assert abs(np.asarray(image).astype(int) - colours / 257).max() <= 1


class TestTransparency:
    @pytest.mark.parametrize(
        ("mode", "clear", "half"),
        [("RGBA", (200, 0, 0, 0), (200, 0, 0, 128)), ("RGBa", (0, 0, 0, 0), (100, 0, 0, 128))],
    )
    def test_shows_white(self, mode, clear, half):
        image = Image.new(mode, (3, 1), (200, 0, 0, 255))
        image.putpixel((0, 0), clear)
        image.putpixel((2, 0), half)
        clear, solid, half = (to_rgb(image).getpixel((x, 0)) for x in range(3))
        assert (clear, solid) == ((255, 255, 255), (200, 0, 0))
        assert np.abs(np.subtract(half, (227, 127, 127))).max() <= 1

    @pytest.mark.parametrize("mode", ["LA", "La", "PA"])
    def test_of_grey_and_palette(self, mode):
        image = Image.new("PA" if mode == "PA" else "LA", (2, 1), (90, 255))
        image.putpixel((1, 0), (90, 0))
        if mode == "PA":
            image.putpalette([level for index in range(256) for level in (index,) * 3])
        result = to_rgb(image if mode == "PA" else image.convert(mode))
        assert [result.getpixel((x, 0)) for x in range(2)] == [(90,) * 3, (255,) * 3]

    @pytest.mark.parametrize(
        ("mode", "level", "clear"), [("P", 1, 0), ("L", 80, 0), ("RGB", (80,) * 3, (0,) * 3)]
    )
    def test_by_one_colour_of_a_png(self, mode, level, clear):
        image = Image.new(mode, (2, 1))
        if mode == "P":
            image.putpalette([9, 9, 9, 80, 80, 80])
        image.putpixel((1, 0), level)
        image = stored(image, "PNG", transparency=clear)
        assert [image.getpixel((x, 0)) for x in range(2)] == [(255,) * 3, (80,) * 3]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_as_pillow_converts_them(mode):
    source = Image.fromarray(PIXELS)
    image = Image.new("LAB", (8, 8), (50, 9, 9)) if mode == "LAB" else source.convert(mode)
    assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()


def test_opaque_pixels_are_untouched_and_orientation_is_not_applied():
    image = Image.fromarray(PIXELS)
    assert to_rgb(image) is image
    assert to_rgb(image.convert("RGBA")).tobytes() == image.tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert stored(image, "PNG", exif=exif).size == image.size
