"""Estimators can be cloned, refitted, copied and saved at any time of their life."""

import copy
import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from skltl import CNNFeatureTransformer

OTHER = {"layer": ["stem", "block2"], "pooling": "max", "image_size": 32}


def test_a_clone_has_the_parameters_and_nothing_else(pictures):
    fitted = CNNFeatureTransformer("tiny", **OTHER).fit(pictures)

    cloned = clone(fitted)

    assert cloned.get_params() == fitted.get_params()
    assert vars(cloned) == vars(CNNFeatureTransformer("tiny", **OTHER))


def test_fitting_again_leaves_nothing_of_the_first_fit(pictures):
    rows = np.random.default_rng(0).random((5, 48))
    again = CNNFeatureTransformer("tiny", image_shape=(4, 4, 3)).fit(rows)

    again.set_params(image_shape=None, **OTHER).fit(pictures)

    fresh = CNNFeatureTransformer("tiny", **OTHER).fit(pictures)
    assert vars(again).keys() == vars(fresh).keys()
    np.testing.assert_array_equal(again.transform(pictures), fresh.transform(pictures))


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda fitted: pickle.loads(pickle.dumps(fitted))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_of_a_fitted_estimator_are_fitted(pictures, copied):
    fitted = CNNFeatureTransformer("tiny", **OTHER).fit(pictures)

    np.testing.assert_array_equal(
        copied(fitted).transform(pictures), fitted.transform(pictures)
    )


def test_a_fit_on_rows_that_fails_leaves_the_last_one():
    rows = np.random.default_rng(0).random((3, 64))
    fitted = CNNFeatureTransformer("tiny", image_shape=(8, 8)).fit(rows)
    expected = fitted.transform(rows)

    with pytest.raises(ValueError, match="block9"):
        fitted.set_params(layer="block9", image_shape=(4, 4)).fit(rows[:, :16])
    fitted.set_params(layer="last", image_shape=(8, 8))
    with pytest.raises(ValueError, match="does not fit rows of 63"):
        fitted.fit(rows[:, :63])

    np.testing.assert_array_equal(fitted.transform(rows), expected)


def test_a_first_fit_that_fails_leaves_the_estimator_unfitted(pictures):
    transformer = CNNFeatureTransformer("tiny", layer="block9")

    with pytest.raises(ValueError, match="block9"):
        transformer.fit(pictures)

    with pytest.raises(NotFittedError):
        transformer.transform(pictures)


def test_a_fit_that_fails_leaves_the_last_one(pictures):
    fitted = CNNFeatureTransformer("tiny").fit(pictures)
    expected = fitted.transform(pictures)

    with pytest.raises(ValueError, match="block9"):
        fitted.set_params(backbone="alexnet", layer="block9").fit(pictures)

    np.testing.assert_array_equal(fitted.transform(pictures), expected)
