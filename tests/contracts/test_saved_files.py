"""Saved estimators can be read by later versions, since they name public paths only."""

import io
import pickle
import runpy
from pathlib import Path

import numpy as np
import pytest
import sklearn
import skops.io
from numpy.testing import assert_allclose
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.utils.fixes import parse_version
from torch import nn

import skltl
from skltl import Backbone, CNNFeatureTransformer, Preprocessing

SAVED = Path(__file__).with_name("saved")
saved_images = runpy.run_path(str(SAVED / "write.py"))["saved_images"]


@pytest.fixture(scope="module")
def fitted_with_own_backbone(shared_images):
    own = Backbone.from_blocks(
        "own", {"stem": nn.Conv2d(3, 4, 3)}, preprocessing=Preprocessing(16)
    )
    return CNNFeatureTransformer(own).fit(shared_images)


class RecordingUnpickler(pickle.Unpickler):
    """Collect the paths of all classes and functions that a pickle names."""

    def __init__(self, file):
        super().__init__(file)
        self.paths = set()

    def find_class(self, module, name):
        self.paths.add(f"{module}.{name}")
        return super().find_class(module, name)


def paths_in_pickle(fitted):
    unpickler = RecordingUnpickler(io.BytesIO(pickle.dumps(fitted)))
    unpickler.load()
    return unpickler.paths


def paths_in_skops(fitted):
    return set(skops.io.get_untrusted_types(data=skops.io.dumps(fitted)))


def private(paths):
    """Return the paths of skltl that have a private part."""
    return {
        path
        for path in paths
        if path.startswith("skltl.")
        and any(part.startswith("_") for part in path.split("."))
    }


@pytest.mark.parametrize("paths", [paths_in_pickle, paths_in_skops])
def test_saved_files_name_only_public_paths(paths, fitted):
    if paths is paths_in_skops and isinstance(getattr(fitted, "backbone", 0), Backbone):
        pytest.skip("skops stores no modules of torch")

    found = paths(fitted)

    assert any(path.startswith("skltl.") for path in found)
    assert private(found) == set()


# skops stores no modules of torch: an own backbone is saved with pickle or joblib.
def test_a_pickle_with_an_own_backbone_names_only_public_paths(
    fitted_with_own_backbone,
):
    found = paths_in_pickle(fitted_with_own_backbone)

    assert any(path.startswith("skltl.") for path in found)
    assert private(found) == set()


RELEASES = sorted(SAVED.glob("*.npz"))


def load_pickle(path):
    return pickle.loads(path.with_suffix(".pickle").read_bytes())


def load_skops(path):
    return skops.io.load(path.with_suffix(".skops"), trusted=skltl.SKOPS_TRUSTED)


def test_there_are_files_of_a_release():
    assert RELEASES


@pytest.mark.parametrize("load", [load_pickle, load_skops])
@pytest.mark.parametrize("path", RELEASES, ids=lambda path: path.stem)
def test_files_of_earlier_releases_are_read(load, path):
    X, y = saved_images()

    transformer, classifier = load(path)

    expected = np.load(path)
    assert_allclose(transformer.transform(X), expected["features"], rtol=1e-4)
    assert_allclose(classifier.predict_proba(X), expected["proba"], rtol=1e-4)
    assert classifier.classes_.tolist() == sorted(set(y))


@pytest.fixture(scope="module")
def nested():
    """Estimators that contain others, saved before 0.2.0 had all its parameters.

    They were fitted to sixty digits and the remainders of a division by 3.
    """
    return pickle.loads((SAVED / "nested" / "5dfac6c.pickle").read_bytes())


# scikit-learn reads its own classifiers in the file, at least those of older versions.
@pytest.mark.skipif(
    parse_version(sklearn.__version__) < parse_version("1.9"),
    reason="the file is of a newer scikit-learn",
)
@pytest.mark.filterwarnings("ignore:Trying to unpickle estimator")
def test_estimators_that_contain_others_are_read(nested):
    rows, labels = load_digits(return_X_y=True)
    X, y = rows[:60] / 16, labels[:60] % 3
    expected = np.load(SAVED / "nested" / "5dfac6c.npz")

    classifier, search = nested["auto"], nested["search"]
    assert_allclose(classifier.decision_function(X), expected["auto"], rtol=1e-3)
    assert_allclose(search.predict_proba(X), expected["search"], rtol=1e-3)
    assert "60 images in 3 classes" in classifier.advisor_.report()
    for one in nested.values():  # the unfitted ones, too
        again = clone(one)
        assert repr(again)
        assert again.get_params().keys() == one.get_params().keys()
    assert clone(search).fit(X, y).best_params_ == search.best_params_
    assert clone(nested["advisor"]).fit(X, y).targets_ == "classes"
    assert_allclose(
        clone(classifier).fit(X, y).decision_function(X), expected["auto"], rtol=1e-3
    )
