"""Rows of numbers become images as ``numpy.reshape`` would have it."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from skltl.images import read_images


def test_digits_are_the_images_scikit_learn_ships():
    digits = load_digits()

    source = read_images(digits.data, image_shape=(8, 8))

    np.testing.assert_array_equal(source[7][:, :, 0], digits.images[7])


@pytest.mark.parametrize(
    ("image_shape", "expected"),
    [((4, 5, 3), (4, 5, 3)), ((-1, 5, 3), (4, 5, 3)), ((3, 4, 5), (4, 5, 3))],
)
def test_colour_rows(image_shape, expected):
    rows = np.random.default_rng(0).integers(256, size=(2, 60)).astype(np.uint8)

    pixels = read_images(rows, image_shape=image_shape)[1]

    by_hand = rows[1].reshape(image_shape if image_shape[0] == 3 else expected)
    if image_shape[0] == 3:
        by_hand = by_hand.transpose(1, 2, 0)
    np.testing.assert_array_equal(pixels, by_hand)


@pytest.mark.parametrize(
    ("image_shape", "words"),
    [
        ((8, 8), "does not fit rows of 63 numbers"),
        ((-1, 8), "does not fit rows of 63 numbers"),
        ((63,), "not the shape of an image"),
        ((-1, -1), "not the shape of an image"),
        ((0, 63), "not the shape of an image"),
        ((7.0, 9), "not the shape of an image"),
        ((7, 3, 3, 1), "not the shape of an image"),
    ],
)
def test_shapes_that_do_not_fit(image_shape, words):
    with pytest.raises(ValueError, match=words):
        read_images(np.zeros((2, 63)), image_shape=image_shape)
