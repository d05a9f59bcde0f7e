"""What ``X`` may be, and the words with which anything else is refused."""

import pickle
import threading

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from PIL import Image
from scipy import sparse

from skltl.exceptions import ImageRangeWarning, ImageReadError, ImageTypeError
from skltl.images import Preprocessing, iter_crops, read_images

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
def test_kinds_of_x_hold_the_same_images(images, image_files, kind):
    source = read_images(KINDS[kind](images, image_files))

    assert len(source) == len(images)
    for pixels, image in zip(source, images, strict=True):
        assert pixels.shape == image.shape
        scale = 255 if pixels.dtype == np.uint8 else 1
        expected = image / 255
        np.testing.assert_allclose(
            pixels / scale, expected, atol=COARSE.get(kind, 1e-6)
        )


def test_readonly_memmap_is_accepted_and_left_alone(images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")

    np.testing.assert_array_equal(read_images(mapped)[4], images[4])


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1), (5, 1, 6, 7)])
def test_grey_images_get_three_equal_channels(shape):
    grey = np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)

    pixels = read_images(grey)[3]

    np.testing.assert_array_equal(
        pixels, np.repeat(grey[3].reshape(6, 7, 1), 3, axis=2)
    )


def test_bool_images_are_black_and_white():
    stripes = np.zeros((2, 4, 5), dtype=bool)
    stripes[:, ::2] = True

    np.testing.assert_array_equal(read_images(stripes)[0][:, 0, 0], [255, 0, 255, 0])


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_rgba_arrays_are_laid_on_white(dtype):
    white = 255 if dtype is np.uint8 else 1
    image = np.zeros((1, 4, 4, 4), dtype=dtype)
    image[:, :, 2:, 3] = white

    pixels = read_images(image)[0]

    assert (pixels[:, :2] == white).all()
    assert (pixels[:, 2:] == 0).all()


def test_images_of_different_sizes():
    items = [np.zeros((4, 9, 3), np.uint8), np.zeros((7, 5), np.uint8)]

    assert [pixels.shape for pixels in read_images(items)] == [(4, 9, 3), (7, 5, 3)]


@pytest.mark.parametrize(
    ("kind", "channel_of_zero"),
    [(np.asarray, "last"), (torch.tensor, "first")],
    ids=["numpy", "torch"],
)
def test_where_both_axes_may_be_channels_the_kind_of_array_decides(
    kind, channel_of_zero
):
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


class Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.zeros(3, 4, 4)


SQUARE = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("X", "error", "words"),
    [
        ("flower.jpg", TypeError, "single path; put it in a list"),
        (Image.new("RGB", (4, 4)), ValueError, "single image.*Reshape your data"),
        (SQUARE, ValueError, "single colour image.*Reshape your data"),
        (torch.zeros(3, 8, 8), ValueError, "single colour image"),
        ({"a": SQUARE}, TypeError, "got dict"),
        ({"a.jpg"}, TypeError, "got set"),
        ((image for image in [SQUARE]), TypeError, "got generator"),
        (Dataset(), TypeError, "got Dataset"),
        (torch.utils.data.DataLoader(Dataset()), TypeError, "got DataLoader"),
        (None, TypeError, "got NoneType"),
        (7, TypeError, "got int"),
        (sparse.csr_matrix(np.eye(4)), TypeError, "Sparse"),
        (sparse.coo_array(np.eye(4)), TypeError, "Sparse"),
        (np.ma.masked_array(np.ones((2, 4, 4))), TypeError, "Masked"),
        ([], ValueError, "0 sample"),
        (np.empty((0, 4, 4, 3)), ValueError, "0 sample"),
        (np.empty((2, 0, 4, 3), np.uint8), ValueError, "empty"),
        (np.float64(3), ValueError, "Reshape your data"),
        (np.arange(4.0), ValueError, "Reshape your data"),
        (np.zeros((3, 64)), ValueError, r"image_shape=\(8, 8\)"),
        (np.zeros((3, 3072)), ValueError, r"image_shape=\(32, 32, 3\)"),
        (np.zeros((3, 7)), ValueError, r"image_shape=\(height, width\)"),
        ([[0.5] * 64, [0.1] * 64], ValueError, r"image_shape=\(8, 8\)"),
        ([[1, 2], [3]], ValueError, "different lengths"),
        (np.array([["1", "2"], ["3", "4"]]), ValueError, r"shape \(2, 2\)"),
        (np.zeros((2, 8, 8, 2), np.uint8), ValueError, "can be the channels"),
        (np.zeros((2, 8, 8, 5), np.uint8), ValueError, "can be the channels"),
        (np.zeros((2, 8, 8, 3, 1)), ValueError, "shape"),
        (["a.jpg", None], ImageTypeError, "Image 1 is a missing value"),
        (["a.jpg", 3.5], ImageTypeError, "Image 1 is a number"),
        ([3, 4], ImageTypeError, "Image 0 is a number"),
        ([SQUARE, SQUARE[0, 0]], ImageReadError, r"Image 1 .*shape is \(3,\)"),
        ([SQUARE, SQUARE[:0]], ImageReadError, "Image 1 .*empty"),
        (
            [SQUARE, np.zeros((8, 8, 5))],
            ImageReadError,
            "Image 1 .*can be the channels",
        ),
        ([np.zeros((8, 9, 3)), np.zeros((3, 8, 9))], ValueError, "in all images"),
        ([SQUARE, np.ma.masked_array(SQUARE)], ImageTypeError, "Image 1 .*masked"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(X, error, words):
    with pytest.raises(error, match=words):
        read_images(X)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((2, 4, 4, 3), np.nan), "NaN"),
        (np.full((2, 4, 4, 3), np.inf), "infinity"),
        (np.zeros((2, 4, 4, 3), complex), "complex128"),
        (np.zeros((2, 4, 4, 3), "datetime64[s]"), "datetime64"),
        (np.zeros((2, 4, 4, 3), np.int64), "int64.*uint8"),
    ],
)
def test_numbers_that_are_no_pixels_are_refused(array, words):
    with pytest.raises(ImageReadError, match=f"Image 1 .*{words}") as info:
        read_images(array)[1]

    assert info.value.path is None


def test_errors_survive_the_way_back_from_a_worker_process():
    error = pickle.loads(pickle.dumps(ImageReadError(3, "a.jpg", "it is empty")))

    assert (error.index, error.path) == (3, "a.jpg")
    assert str(error) == "Image 3 ('a.jpg') could not be read: it is empty."


def test_an_image_not_yet_loaded_may_stand_at_many_places(image_files, images):
    with Image.open(image_files[0]) as lazy:
        source = read_images([lazy] * 60)
        crops = list(iter_crops(source, range(60), Preprocessing(40), 60, n_threads=8))

    assert len(crops) == 60
    for crop in crops:
        np.testing.assert_array_equal(crop.pixels, images[0][:, 4:44])


def walked(source):
    images = list(source)
    source.warn_of_odd_range()
    return images


def test_floats_outside_0_and_1_are_warned_of_once_with_their_range():
    floats = np.zeros((5, 4, 4, 3))
    floats[1], floats[3] = 255, -2

    with pytest.warns(ImageRangeWarning, match="from -2 to 255") as record:
        walked(read_images(floats))

    assert len(record) == 1


def test_an_image_not_yet_loaded_may_stand_in_many_sources(image_files, images):
    lazy = [Image.open(path) for path in image_files]
    barrier = threading.Barrier(4)
    found = []

    def read_all():
        barrier.wait()
        found.append([pixels.copy() for pixels in read_images(lazy)])

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for image in lazy:
        image.close()

    assert len(found) == 4
    for read in found:
        np.testing.assert_array_equal(read, images)


@pytest.mark.parametrize("dtype", [">u2", "<u2", ">f4", ">f8"])
def test_rows_of_any_byte_order_hold_the_same_images(dtype):
    values = np.arange(12).reshape(1, 12) * 5000
    scale = 65535 if dtype[1] == "u" else 1

    pixels = read_images(values.astype(dtype), image_shape=(3, 4))[0]

    expected = values.reshape(3, 4) / scale
    np.testing.assert_allclose(pixels[:, :, 0], expected, rtol=1e-6)


def test_rows_of_integers_that_do_not_say_what_white_is_are_warned_of():
    rows = np.arange(12).reshape(1, 12) * 20

    with pytest.warns(ImageRangeWarning, match="from 0 to 220"):
        walked(read_images(rows, image_shape=(3, 4)))


def test_rows_are_taken_as_they_are():
    rows = np.arange(12.0).reshape(2, 6)

    source = read_images(rows, image_shape=(2, -1))

    np.testing.assert_array_equal(source[1][:, :, 2], [[6, 7, 8], [9, 10, 11]])
