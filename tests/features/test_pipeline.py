"""The three classical classifiers, ready to fit."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, train_test_split

from skltl import make_feature_pipeline


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return train_test_split(
        X / 16, y, train_size=200, test_size=300, stratify=y, random_state=0
    )


@pytest.mark.parametrize("classifier", ["svm", "softmax", "ovr", RidgeClassifier()])
def test_pipelines_learn_digits(digits, classifier):
    X_train, X_test, y_train, y_test = digits
    pipeline = make_feature_pipeline(
        "tiny", classifier, layer="block3", image_shape=(8, 8)
    )

    assert pipeline.fit(X_train, y_train).score(X_test, y_test) > 0.8


def test_a_grid_over_the_cut_point(digits):
    X_train, _, y_train, _ = digits
    pipeline = make_feature_pipeline("tiny", "svm", image_shape=(8, 8))
    grid = GridSearchCV(
        pipeline,
        {"feat__layer": ["stem", "block3"], "svm__C": [0.001, 0.01]},
        cv=2,
        n_jobs=2,
        error_score="raise",
    )

    grid.fit(X_train, y_train)

    assert grid.best_params_["feat__layer"] == "block3"


def test_the_steps_of_two_pipelines_are_their_own():
    first, second = (make_feature_pipeline("tiny", "svm") for _ in range(2))
    first.set_params(svm__C=7)

    assert second.get_params()["svm__C"] == 0.01


LABELS = {
    "strings": np.array(["rose", "tulip", "lily"]),
    "objects": np.array(["rose", "tulip", "lily"], dtype=object),
    "bools": np.array([True, False]),
    "negative": np.array([-1, 7, 3]),
}
NO_LABELS = {
    "too few": list("ab"),
    "None": ["a", "b", None] * 3,
    "continuous": np.linspace(0, 1, 9),
}


@pytest.mark.parametrize("classifier", ["svm", "softmax", "ovr"])
@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_kind_come_back(pictures, classifier, kind):
    labels = np.resize(LABELS[kind], len(pictures))

    pipeline = make_feature_pipeline("tiny", classifier).fit(pictures, labels)

    assert set(pipeline.predict(pictures)) <= set(labels)
    assert list(pipeline.classes_) == sorted(set(labels))
    if classifier != "ovr":  # scikit-learn's OneVsRestClassifier loses the type object
        assert pipeline.classes_.dtype == labels.dtype


# What else is no label (NaN, several for one picture) is left to scikit-learn, whose
# OneVsRestClassifier takes it.
@pytest.mark.parametrize("classifier", ["svm", "softmax", "ovr"])
@pytest.mark.parametrize("kind", NO_LABELS)
def test_what_is_no_label_is_refused(pictures, classifier, kind):
    with pytest.raises((ValueError, TypeError)):
        make_feature_pipeline("tiny", classifier).fit(pictures, NO_LABELS[kind])


def test_unknown_classifiers_are_refused():
    with pytest.raises(ValueError, match="svm, softmax, ovr"):
        make_feature_pipeline("tiny", "forest")
