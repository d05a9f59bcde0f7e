"""`find_bad_images` lists all unreadable images with their reasons."""

import numpy as np
import pandas as pd
import pytest

from skltl import drop_bad, find_bad_images
from skltl.exceptions import BadImageWarning


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_bad_images_are_listed_in_order(image_files, tmp_path, n_jobs):
    (tmp_path / "empty.jpg").write_bytes(b"")
    nan = np.full((4, 4), np.nan)
    five = np.zeros((5, 4, 5), np.uint8)
    items = [*image_files, tmp_path / "empty.jpg", None, nan, "missing.jpg", five]

    bad = find_bad_images(items, n_jobs=n_jobs)

    assert [(one.index, one.path) for one in bad] == [
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


def test_missing_cells_are_listed_with_their_index_label():
    series = pd.Series([None, "missing.jpg"], index=["a", "b"])

    bad = find_bad_images(series)

    assert [one.index for one in bad] == [0, 1]
    assert "missing value" in bad[0].reason
    assert "index label 'a'" in bad[0].reason


def test_the_list_is_empty_for_readable_images(image_files):
    assert find_bad_images(image_files) == []


def test_a_single_path_is_refused():
    with pytest.raises(TypeError, match="put it in a list"):
        find_bad_images("flower.jpg")


def test_none_among_the_arrays_stays_none(image_files):
    X = [*image_files[:2], "missing.jpg"]

    with pytest.warns(BadImageWarning):
        kept, y, groups = drop_bad(X, [0, 1, 2], None)

    assert (len(kept), y, groups) == (2, [0, 1], None)


def test_bad_images_of_a_table_are_named_by_their_label(image_files):
    encoded = [path.read_bytes() for path in image_files[:3]]
    column = pd.Series([encoded[0], b"nonsense", encoded[2]], index=["a", "b", "c"])

    (bad,) = find_bad_images(column)

    assert (bad.index, bad.path) == (1, "index label 'b'")
