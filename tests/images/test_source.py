"""Supported kinds of ``X``, the axis of the channels, and rows of pixels."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from skltl.exceptions import ImageReadError
from skltl.images import JoinedSource, PartOfSource, read_images

KINDS = {
    "list of paths": lambda arrays, paths: paths,
    "tuple of strings": lambda arrays, paths: tuple(map(str, paths)),
    "array of strings": lambda arrays, paths: np.array([str(path) for path in paths]),
    "column of paths": lambda arrays, paths: np.array(paths, dtype=object)[:, None],
    "pandas series": lambda arrays, paths: pd.Series([str(path) for path in paths]),
    "pandas column": lambda arrays, paths: pd.DataFrame({"path": map(str, paths)}),
    "polars series": lambda arrays, paths: pl.Series([str(path) for path in paths]),
    "polars column": lambda arrays, paths: pl.DataFrame({"path": [*map(str, paths)]}),
    "images": lambda arrays, paths: [Image.fromarray(array) for array in arrays],
    "array": lambda arrays, paths: arrays,
    "channels first": lambda arrays, paths: arrays.transpose(0, 3, 1, 2),
    "fortran order": lambda arrays, paths: np.asfortranarray(arrays),
    "negative strides": lambda arrays, paths: arrays[::-1, ::-1].copy()[::-1, ::-1],
    "list of arrays": lambda arrays, paths: list(arrays),
    "array of arrays": lambda arrays, paths: _object_array(arrays),
    "list of tensors": lambda arrays, paths: [
        torch.tensor(array).permute(2, 0, 1) for array in arrays
    ],
    "tensor": lambda arrays, paths: torch.tensor(arrays).permute(0, 3, 1, 2),
    "nested lists": lambda arrays, paths: (arrays / 255).tolist(),
    "uint16": lambda arrays, paths: arrays.astype(np.uint16) * 257,
    "big-endian": lambda arrays, paths: (arrays / 255).astype(">f8"),
    "float16": lambda arrays, paths: (arrays / 255).astype(np.float16),
    "float32": lambda arrays, paths: (arrays / 255).astype(np.float32),
    "bfloat16": lambda arrays, paths: torch.tensor(arrays / 255).bfloat16(),
    "mixed": lambda arrays, paths: [
        paths[0],
        str(paths[1]),
        Image.fromarray(arrays[2]),
        *arrays[3:],
    ],
}
COARSE = {"float16": 1e-3, "bfloat16": 5e-3}


def _object_array(arrays):
    items = np.empty(len(arrays), dtype=object)
    items[:] = list(arrays)
    return items


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_x_holds_the_same_images(images, image_files, kind):
    source = read_images(KINDS[kind](images, image_files))

    assert len(source) == len(images)
    for pixels, image in zip(source, images, strict=True):
        assert pixels.shape == image.shape
        scale = 255 if pixels.dtype == np.uint8 else 1
        expected = image / 255
        np.testing.assert_allclose(
            pixels / scale, expected, atol=COARSE.get(kind, 1e-6)
        )


def test_a_readonly_memmap_is_accepted(images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")

    np.testing.assert_array_equal(read_images(mapped)[4], images[4])


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1), (5, 1, 6, 7)])
def test_gray_images_get_three_equal_channels(shape):
    gray = np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)

    pixels = read_images(gray)[3]

    np.testing.assert_array_equal(
        pixels, np.repeat(gray[3].reshape(6, 7, 1), 3, axis=2)
    )


def test_bool_images_are_black_and_white():
    stripes = np.zeros((2, 4, 5), dtype=bool)
    stripes[:, ::2] = True

    np.testing.assert_array_equal(read_images(stripes)[0][:, 0, 0], [255, 0, 255, 0])


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_rgba_arrays_are_composited_on_white(dtype):
    white = 255 if dtype is np.uint8 else 1
    image = np.zeros((1, 4, 4, 4), dtype=dtype)
    image[:, :, 2:, 3] = white

    pixels = read_images(image)[0]

    assert (pixels[:, :2] == white).all()
    assert (pixels[:, 2:] == 0).all()


def test_images_may_have_different_sizes():
    items = [np.zeros((4, 9, 3), np.uint8), np.zeros((7, 5), np.uint8)]

    assert [pixels.shape for pixels in read_images(items)] == [(4, 9, 3), (7, 5, 3)]


@pytest.mark.parametrize(
    ("kind", "channel_of_zero"),
    [(np.asarray, "last"), (torch.tensor, "first")],
    ids=["numpy", "torch"],
)
def test_the_kind_of_array_decides_if_both_axes_can_be_channels(kind, channel_of_zero):
    batch = np.full((2, 3, 5, 3), 9, np.uint8)
    batch[:, 0] = 0

    pixels = read_images(kind(batch))[0]

    if channel_of_zero == "first":
        assert pixels.shape == (5, 3, 3)
        assert (pixels[:, :, 0] == 0).all()
    else:
        assert pixels.shape == (3, 5, 3)
        assert (pixels[0] == 0).all()


def test_the_channel_axis_is_decided_for_all_images_together():
    first = [np.zeros((3, 8, 9), np.uint8), np.zeros((3, 8, 3), np.uint8)]

    assert [pixels.shape for pixels in read_images(first)] == [(8, 9, 3), (8, 3, 3)]


@pytest.mark.parametrize("dtype", [">u2", "<u2", ">f4", ">f8"])
def test_rows_may_have_any_byte_order(dtype):
    values = np.arange(12).reshape(1, 12) * 5000
    scale = 65535 if dtype[1] == "u" else 1

    pixels = read_images(values.astype(dtype), image_shape=(3, 4))[0]

    expected = values.reshape(3, 4) / scale
    np.testing.assert_allclose(pixels[:, :, 0], expected, rtol=1e-6)


def test_rows_of_floats_are_not_scaled():
    rows = np.arange(12.0).reshape(2, 6)

    source = read_images(rows, image_shape=(2, -1))

    np.testing.assert_array_equal(source[1][:, :, 2], [[6, 7, 8], [9, 10, 11]])


def test_rows_of_digits_are_the_images_of_scikit_learn():
    digits = load_digits()

    source = read_images(digits.data, image_shape=(8, 8))

    np.testing.assert_array_equal(source[7][:, :, 0], digits.images[7])


@pytest.mark.parametrize("image_shape", [(4, 5, 3), (-1, 5, 3), (3, 4, 5)])
def test_rows_may_be_color_images(image_shape):
    rows = np.random.default_rng(0).integers(256, size=(2, 60)).astype(np.uint8)

    pixels = read_images(rows, image_shape=image_shape)[1]

    by_hand = rows[1].reshape(image_shape)
    expected = by_hand.transpose(1, 2, 0) if image_shape[0] == 3 else by_hand
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
    ("image_shape", "words"),
    [
        ((8, 8), "does not fit rows of 63 values"),
        ((-1, 8), "does not fit rows of 63 values"),
        ((63,), "not the shape of an image"),
        ((-1, -1), "not the shape of an image"),
        ((0, 63), "not the shape of an image"),
        ((7.0, 9), "not the shape of an image"),
        ((7, 3, 3, 1), "not the shape of an image"),
    ],
)
def test_an_image_shape_that_does_not_fit_is_refused(image_shape, words):
    with pytest.raises(ValueError, match=words):
        read_images(np.zeros((2, 63)), image_shape=image_shape)


@pytest.mark.parametrize("kind", ["list of paths", "array", "mixed", "joined"])
def test_a_part_of_a_source_holds_some_of_its_images(images, image_files, kind):
    if kind == "joined":
        parts = read_images(images[:4]), read_images(image_files[4:])
        whole = JoinedSource(*parts)
    else:
        whole = read_images(KINDS[kind](images, image_files))

    part = PartOfSource(whole, slice(3, 7))

    np.testing.assert_array_equal(list(part), images[3:7])
    np.testing.assert_array_equal(list(part.reduced_to(8)), images[3:7])
    for index in range(4):
        assert part.path(index) == whole.path(3 + index)
        assert part.is_array(index) == whole.is_array(3 + index)


def test_an_error_in_a_part_of_a_source_has_the_index_in_the_whole(image_files):
    image_files[5].write_bytes(b"no image")
    part = PartOfSource(read_images(image_files), slice(3, 7))

    with pytest.raises(ImageReadError, match="Image 5 "):
        part[2]


def test_values_of_a_part_of_a_source_are_those_of_the_whole(images):
    whole = read_images(images.astype(np.float32))

    list(PartOfSource(whole, slice(3, 7)))

    low, high = images[3:7].min(), images[3:7].max()
    assert whole.ranges.found() == {"floats": (low, high)}
