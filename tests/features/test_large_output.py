"""Features that exceed the limit in memory are backed by a temporary file."""

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


@pytest.fixture(scope="module")
def transformer(shared_images):
    transformer = CNNFeatureTransformer("tiny", image_size=16, engine="torch")
    return transformer.fit(shared_images)


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr("skltl._large_arrays.MAX_BYTES_IN_MEMORY", 0)


def test_features_in_a_file_are_those_in_memory(
    transformer, images, monkeypatch, tmp_path, request
):
    expected = transformer.transform(images)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    request.getfixturevalue("no_memory")
    features = transformer.transform(images)

    assert_array_equal(features, expected)
    assert features.flags.writeable
    assert list(tmp_path.iterdir()) == []  # the file has no name
    assert_array_equal(pickle.loads(pickle.dumps(features)), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("no_memory")
def test_features_in_a_file_can_be_used_by_other_processes(transformer, images):
    features = np.repeat(transformer.transform(images), 20, axis=0)
    large = transformer.transform(np.repeat(images, 20, axis=0))
    labels = np.arange(180) // 20 % 2
    model = LogisticRegression(C=0.01)

    assert_array_equal(
        cross_val_score(model, large, labels, cv=2, n_jobs=2),
        cross_val_score(model, features, labels, cv=2),
    )


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("can_reserve", [True, False])
def test_a_full_disk_gives_a_warning(can_reserve, transformer, images, monkeypatch):
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


@pytest.mark.usefixtures("no_memory")
def test_a_missing_folder_gives_a_warning(transformer, images, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")

    with pytest.warns(RuntimeWarning, match=r"/nonexistent.*No such file"):
        assert transformer.transform(images).shape[0] == len(images)
