"""Images that cannot be read are all found, with their reasons."""

import numpy as np
import pytest

from skltl import find_bad_images


def test_bad_images_are_listed_in_order(image_files, tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    nan = np.full((4, 4), np.nan)
    five = np.zeros((5, 4, 5), np.uint8)
    items = [*image_files, tmp_path / "empty.jpg", None, nan, "missing.jpg", five]

    bad = find_bad_images(items)

    assert [(index, path) for index, path, _ in bad] == [
        (9, str(tmp_path / "empty.jpg")),
        (10, None),
        (11, None),
        (12, "missing.jpg"),
        (13, None),
    ]
    reasons = [
        "is empty",
        "missing value",
        "NaN",
        "no such file",
        "can be the channels",
    ]
    for found, words in zip(bad, reasons, strict=True):
        assert words in found.reason


def test_nothing_bad_among_good_images(image_files):
    assert find_bad_images(image_files) == []


def test_what_is_no_list_of_images_is_an_error():
    with pytest.raises(TypeError, match="put it in a list"):
        find_bad_images("flower.jpg")
