"""Features that do not fit memory lie in a file, and serve like others."""

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
def transformer(pictures):
    return CNNFeatureTransformer("tiny", image_size=32, engine="torch").fit(pictures)


@pytest.fixture
def nothing_fits(monkeypatch):
    monkeypatch.setattr("skltl._large_arrays.MAX_BYTES_IN_MEMORY", 0)


def test_features_in_a_file_are_the_same(
    transformer, pictures, monkeypatch, tmp_path, request
):
    expected = transformer.transform(pictures)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    request.getfixturevalue("nothing_fits")
    features = transformer.transform(pictures)

    assert_array_equal(features, expected)
    assert features.flags.writeable
    assert list(tmp_path.iterdir()) == []  # the file has no name
    assert_array_equal(pickle.loads(pickle.dumps(features)), expected)


@pytest.mark.usefixtures("nothing_fits")
def test_other_processes_can_use_features_in_a_file(transformer, pictures):
    features = np.repeat(transformer.transform(pictures), 20, axis=0)
    large = transformer.transform(np.repeat(pictures, 20, axis=0))
    labels = np.arange(180) // 20 % 2
    model = LogisticRegression(C=0.01)

    assert_array_equal(
        cross_val_score(model, large, labels, cv=2, n_jobs=2),
        cross_val_score(model, features, labels, cv=2),
    )


@pytest.mark.usefixtures("nothing_fits")
def test_a_full_disk_is_an_error_not_the_end(transformer, pictures):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError, match=r"no room for an array of .* GB .*TMPDIR"):
            transformer.transform(pictures)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
