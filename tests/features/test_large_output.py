"""Features that do not fit memory lie in a file, and serve like others."""

import os
import pickle
import resource
import tempfile

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from skltl import CNNFeatureTransformer


@pytest.fixture
def transformer(images):
    return CNNFeatureTransformer("tiny", image_size=32, engine="torch").fit(images)


@pytest.fixture
def nothing_fits(monkeypatch):
    monkeypatch.setattr("skltl._large_arrays.MAX_BYTES_IN_MEMORY", 0)


def test_features_in_a_file_are_the_same(
    transformer, images, monkeypatch, tmp_path, request
):
    expected = transformer.transform(images)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    request.getfixturevalue("nothing_fits")
    features = transformer.transform(images)

    assert_array_equal(features, expected)
    assert features.flags.writeable
    assert list(tmp_path.iterdir()) == []  # the file has no name
    assert_array_equal(pickle.loads(pickle.dumps(features)), expected)


@pytest.mark.usefixtures("nothing_fits")
def test_other_processes_can_use_features_in_a_file(transformer, images):
    features = np.repeat(transformer.transform(images), 20, axis=0)
    large = transformer.transform(np.repeat(images, 20, axis=0))
    labels = np.arange(180) // 20 % 2
    model = LogisticRegression(C=0.01)

    assert_array_equal(
        cross_val_score(model, large, labels, cv=2, n_jobs=2),
        cross_val_score(model, features, labels, cv=2),
    )


@pytest.mark.usefixtures("nothing_fits")
@pytest.mark.parametrize("can_reserve", [True, False])
def test_a_full_disk_is_a_warning_not_the_end(
    can_reserve, transformer, images, monkeypatch
):
    expected = transformer.transform(images)
    if not can_reserve:  # as on macOS and Windows
        monkeypatch.delattr(os, "posix_fallocate")
        assert_array_equal(transformer.transform(images), expected)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.warns(RuntimeWarning, match=r"in memory.*File too large.*TMP"):
            features = transformer.transform(images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert_array_equal(features, expected)


@pytest.mark.usefixtures("nothing_fits")
def test_a_folder_that_is_not_there_is_a_warning(transformer, images, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")

    with pytest.warns(RuntimeWarning, match="in '/nonexistent' .No such file"):
        assert transformer.transform(images).shape[0] == len(images)
