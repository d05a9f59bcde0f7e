"""Values that are not what pixels look like: one warning, with the right remedy."""

import warnings

import numpy as np
import pytest
from PIL import Image

from skltl.exceptions import ImageRangeWarning
from skltl.images import read_images


def warned(source):
    """Read all images and return the texts of the warnings."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        list(source)
        source.warn_of_odd_range()
    assert all(one.category is ImageRangeWarning for one in record)
    return [str(one.message) for one in record]


def floats(low, high):
    return np.linspace(low, high, 4 * 64).reshape(4, 8, 8)


@pytest.mark.parametrize(
    ("low", "high", "remedy"),
    [
        (0, 1.05, "np.clip"),
        (-0.04, 1.02, "np.clip"),
        (0, 2, "the value that stands for white"),
        (0, 15, "Divide them by 16"),
        (0, 16, "Divide them by 16"),
        (0, 255, "Divide them by 255, or pass them as uint8"),
        (3, 200, "Divide them by 255"),
        (0, 4095, "Divide them by 4095"),
        (0, 65535, "Divide them by 65535, or pass them as uint16"),
        (0, 1e6, "the value that stands for white"),
        (-1, 1, r"pass (X + 1) / 2"),
        (-2.1, 2.6, "They look normalized: undo it"),
        (-1.5, 0.9, "They look normalized: undo it"),
        (-123, 151, "If a mean was subtracted"),
    ],
)
@pytest.mark.parametrize("kind", ["images", "rows", "colour"])
def test_floats_get_the_remedy_for_their_range(low, high, remedy, kind):
    images = floats(low, high)
    sources = {
        "images": lambda: read_images(images),
        "rows": lambda: read_images(images.reshape(4, 64), image_shape=(8, 8)),
        "colour": lambda: read_images(list(np.stack([images] * 3, axis=3))),
    }

    (text,) = warned(sources[kind]())

    assert f"range from {low:.4g} to {high:.4g}" in text
    assert remedy in text
    assert len(text) < 500


@pytest.mark.parametrize("dtype", [np.int64, np.int8, float])
def test_rows_of_any_numbers_are_asked(dtype):
    rows = np.arange(64).reshape(1, 64).astype(dtype)

    (text,) = warned(read_images(rows, image_shape=(8, 8)))

    assert "range from 0 to 63" in text


def test_floats_that_are_pixels_get_no_warning():
    assert warned(read_images(floats(0, 1))) == []
    assert warned(read_images(floats(0, 1).reshape(4, 64), image_shape=(8, 8))) == []


def deep_files(values, folder, extension):
    paths = [folder / f"deep_{number}.{extension}" for number in range(len(values))]
    for path, image in zip(paths, values, strict=True):
        Image.fromarray(image).save(path)
    return paths


@pytest.mark.parametrize(
    ("largest", "remedy"),
    [
        (200, "pass them as uint8"),
        (900, "scale them by 65535 / 4095"),
        (4095, "scale them by 65535 / 4095"),
        (8191, "divide by the value of white"),
    ],
)
@pytest.mark.parametrize("kind", ["png", "tif", "array", "colour"])
def test_dark_images_of_16_bits_get_one_warning(largest, remedy, kind, tmp_path):
    values = np.linspace(0, largest, 256).astype(np.uint16).reshape(4, 8, 8)
    images = {
        "array": lambda: values,
        "colour": lambda: list(np.stack([values] * 3, axis=3)),
        "png": lambda: deep_files(values, tmp_path, "png"),
        "tif": lambda: deep_files(values, tmp_path, "tif"),
    }[kind]()

    (text,) = warned(read_images(images))

    assert f"the largest one here is {largest}," in text
    assert remedy in text


def test_one_bright_image_of_16_bits_speaks_for_all():
    values = np.full((4, 8, 8), 1000, np.uint16)
    values[2, 0, 0] = 8192

    assert warned(read_images(values)) == []


def test_black_images_of_16_bits_get_no_warning():
    assert warned(read_images(np.zeros((2, 8, 8), np.uint16))) == []


def test_images_of_8_bits_may_be_dark():
    assert warned(read_images(np.ones((2, 8, 8), np.uint8))) == []
