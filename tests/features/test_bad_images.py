"""Bad images do not lose the features of the others."""

import pickle
import threading

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.pipeline import make_pipeline

from skltl import CNNFeatureTransformer, drop_bad, find_bad_images
from skltl.exceptions import BadImageWarning, ImageReadError, ImageTypeError


@pytest.fixture
def damaged(image_files):
    """Nine files, of which number 2 is empty and number 8 is missing."""
    image_files[2].write_bytes(b"")
    image_files[8].unlink()
    return image_files


GOOD = [0, 1, 3, 4, 5, 6, 7]


def transformer(**params):
    return CNNFeatureTransformer("tiny", image_size=32, **params)


@pytest.mark.parametrize("n_jobs", [1, 4])
@pytest.mark.parametrize("cache", [False, True])
def test_the_features_of_the_others_are_computed(damaged, tmp_path, cache, n_jobs):
    folder = tmp_path / "cache" if cache else None
    tolerant = transformer(on_error="nan", cache=folder, n_jobs=n_jobs)
    expected = transformer().fit_transform([damaged[index] for index in GOOD])

    for _ in range(2):  # the second time from the cache
        features = tolerant.fit_transform(damaged)

        np.testing.assert_array_equal(features[GOOD], expected)
        assert np.isnan(features[[2, 8]]).all()
        assert tolerant.bad_images_ == find_bad_images(damaged)
        assert [bad[:2] for bad in tolerant.bad_images_] == [
            (2, str(damaged[2])),
            (8, str(damaged[8])),
        ]


def test_a_repaired_file_is_read(damaged, images, tmp_path):
    tolerant = transformer(on_error="nan", cache=tmp_path / "cache").fit(damaged)
    tolerant.transform(damaged)
    for path in (damaged[2], damaged[8]):
        Image.fromarray(images[0]).save(path)

    features = tolerant.transform(damaged)

    assert np.isfinite(features).all()
    assert tolerant.bad_images_ == []
    tolerant.set_params(on_error="raise").transform(damaged)
    assert not hasattr(tolerant, "bad_images_")
    tolerant.set_params(on_error="nan").transform(damaged)
    assert not hasattr(tolerant.fit(damaged), "bad_images_")


def test_missing_values_are_bad_images(images):
    cells = [Image.fromarray(images[0]), None, images[1], np.nan, 7]
    column = pd.Series(cells, index=list("abcde"))
    tolerant = transformer(on_error="nan")

    features = tolerant.fit_transform(column)

    assert np.isnan(features).all(axis=1).tolist() == [False, True, False, True, True]
    assert "missing value (index label 'b')" in tolerant.bad_images_[0].reason
    with pytest.raises(ImageTypeError, match="Image 1 is a missing value"):
        transformer().fit(column)


def test_all_images_may_be_bad():
    tolerant = transformer(on_error="nan")

    features = tolerant.fit_transform(["nowhere.jpg", b"no image"])

    assert np.isnan(features).all()
    assert [bad.index for bad in tolerant.bad_images_] == [0, 1]


def test_errors_are_raised_by_default(damaged):
    with pytest.raises(ImageReadError, match="Image 2 .*empty"):
        transformer().fit_transform(damaged)


def test_a_classifier_that_takes_nan_can_be_fitted(damaged):
    labels = np.arange(9) % 2
    model = make_pipeline(
        transformer(on_error="nan"), HistGradientBoostingClassifier(min_samples_leaf=1)
    )

    predicted = model.fit(damaged, labels).predict(damaged)

    np.testing.assert_array_equal(predicted[GOOD], labels[GOOD])


def test_bad_images_are_not_saved(damaged):
    tolerant = transformer(on_error="nan").fit(damaged)
    tolerant.transform(damaged)

    loaded = pickle.loads(pickle.dumps(tolerant))

    assert not hasattr(loaded, "bad_images_")
    assert not hasattr(clone(tolerant), "bad_images_")
    assert np.isnan(loaded.transform(damaged)[8]).all()


def test_threads_get_their_own_features(damaged):
    tolerant = transformer(on_error="nan").fit(damaged)
    found = {}

    def transform(index):
        found[index] = tolerant.transform([damaged[index]])

    threads = [threading.Thread(target=transform, args=(index,)) for index in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(i for i in found if np.isnan(found[i]).any()) == [2, 8]


def test_drop_bad_drops_images_and_their_labels(damaged):
    labels, weights = list("abcdefghi"), np.arange(9)

    with pytest.warns(BadImageWarning, match=r"2 of 9 .* image 2 \('.*image_2.png'\)"):
        X, y, weights = drop_bad(damaged, labels, weights)

    assert list(X) == [damaged[index] for index in GOOD]
    assert y == [labels[index] for index in GOOD]
    assert weights.tolist() == GOOD


def test_drop_bad_keeps_the_kind_of_a_table(damaged):
    frame = pd.DataFrame({"image": [str(path) for path in damaged]}, index=range(9, 18))

    with pytest.warns(BadImageWarning):
        kept = drop_bad(frame)

    assert kept.index.tolist() == [9 + index for index in GOOD]


def test_drop_bad_returns_readable_images_unchanged(images, recwarn):
    labels = list("abcdefghi")

    X, y = drop_bad(images, labels)

    assert X is images
    assert y is labels
    assert not recwarn.list


def test_drop_bad_refuses_labels_of_another_length(damaged):
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        drop_bad(damaged, [0, 1])
