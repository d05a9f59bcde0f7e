"""Unusual ranges of values give one warning, with the right remedy."""

import warnings

import numpy as np
import pytest
from PIL import Image

from skltl.exceptions import ImageRangeWarning
from skltl.images import read_images


def warned(source):
    """Read all images and return the messages of the warnings."""
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
        (0, 2, "the value of white"),
        (0, 15, "Divide them by 16"),
        (0, 16, "Divide them by 16"),
        (0, 255, "Divide them by 255, or pass them as uint8"),
        (3, 200, "Divide them by 255"),
        (0, 4095, "Divide them by 4095"),
        (0, 65535, "Divide them by 65535, or pass them as uint16"),
        (0, 1e6, "the value of white"),
        (-1, 1, r"pass (X + 1) / 2"),
        (-2.1, 2.6, "pass X * std + mean"),
        (-1.5, 0.9, "pass X * std + mean"),
        (-123, 151, "If a mean was subtracted"),
    ],
)
def test_floats_get_the_remedy_for_their_range(low, high, remedy):
    (message,) = warned(read_images(floats(low, high)))

    assert f"range from {low:.4g} to {high:.4g}" in message
    assert remedy in message
    assert len(message) < 500


def test_rows_and_color_images_are_checked_like_gray_images():
    images = floats(-1, 300)
    rows = read_images(images.reshape(4, 64), image_shape=(8, 8))
    color = read_images(list(np.stack([images] * 3, axis=3)))

    assert warned(rows) == warned(color) == warned(read_images(images))


@pytest.mark.parametrize("dtype", [np.int64, np.int8, float])
def test_rows_of_any_dtype_are_checked(dtype):
    rows = np.arange(64).reshape(1, 64).astype(dtype)

    (message,) = warned(read_images(rows, image_shape=(8, 8)))

    assert "range from 0 to 63" in message


def test_floats_in_0_to_1_get_no_warning():
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
        (900, "pass value_range=(0, 4095)"),
        (4095, "pass value_range=(0, 4095)"),
        (8191, "pass value_range=(0, white)"),
    ],
)
@pytest.mark.parametrize("kind", ["png", "tif", "array", "color"])
def test_dark_16_bit_images_get_one_warning(largest, remedy, kind, tmp_path):
    values = np.linspace(0, largest, 256).astype(np.uint16).reshape(4, 8, 8)
    images = {
        "array": lambda: values,
        "color": lambda: list(np.stack([values] * 3, axis=3)),
        "png": lambda: deep_files(values, tmp_path, "png"),
        "tif": lambda: deep_files(values, tmp_path, "tif"),
    }[kind]()

    (message,) = warned(read_images(images))

    assert f"the largest one here is {largest}," in message
    assert remedy in message


def test_one_bright_16_bit_image_prevents_the_warning():
    values = np.full((4, 8, 8), 1000, np.uint16)
    values[2, 0, 0] = 8192

    assert warned(read_images(values)) == []


def test_black_16_bit_images_get_no_warning():
    assert warned(read_images(np.zeros((2, 8, 8), np.uint16))) == []


def test_dark_8_bit_images_get_no_warning():
    assert warned(read_images(np.ones((2, 8, 8), np.uint8))) == []
