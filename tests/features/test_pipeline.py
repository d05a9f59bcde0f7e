"""Pipelines of a transformer and each of three linear classifiers."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.ensemble import VotingClassifier
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC

from skltl import make_feature_pipeline

SMALL = {"image_shape": (8, 8), "image_size": 32}


@pytest.fixture(scope="module")
def few_digits():
    X, y = load_digits(return_X_y=True)
    return train_test_split(
        X / 16, y, train_size=120, test_size=150, stratify=y, random_state=0
    )


@pytest.mark.parametrize("classifier", ["svm", "softmax", "ovr", RidgeClassifier()])
def test_pipelines_classify_digits(few_digits, classifier):
    X_train, X_test, y_train, y_test = few_digits
    pipeline = make_feature_pipeline("tiny", classifier, layer="block3", **SMALL)

    assert pipeline.fit(X_train, y_train).score(X_test, y_test) > 0.8


@pytest.mark.parametrize("n_jobs", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_grid_search_over_the_layer(few_digits, n_jobs):
    X_train, _, y_train, _ = few_digits
    pipeline = make_feature_pipeline("tiny", "svm", **SMALL)
    grid = GridSearchCV(
        pipeline,
        {"feat__layer": ["stem", "block3"], "svm__C": [0.001, 0.01]},
        cv=2,
        n_jobs=n_jobs,
        error_score="raise",
    )

    grid.fit(X_train, y_train)

    assert grid.best_params_["feat__layer"] == "block3"


def test_pipelines_do_not_share_their_steps():
    first, second = (make_feature_pipeline("tiny", "svm") for _ in range(2))
    first.set_params(svm__C=7)

    assert second.get_params()["svm__C"] == 0.01


LABELS = {
    "strings": np.array(["rose", "tulip", "lily"]),
    "objects": np.array(["rose", "tulip", "lily"], dtype=object),
    "bools": np.array([True, False]),
    "negative": np.array([-1, 7, 3]),
}
INVALID_LABELS = {
    "too few": list("ab"),
    "None": ["a", "b", None] * 3,
    "continuous": np.linspace(0, 1, 9),
}


@pytest.mark.parametrize("classifier", ["svm", "softmax", "ovr"])
@pytest.mark.parametrize("kind", LABELS)
def test_predictions_have_the_type_of_the_labels(images, classifier, kind):
    labels = np.resize(LABELS[kind], len(images))
    pipeline = make_feature_pipeline("tiny", classifier, image_size=16)

    pipeline.fit(images, labels)

    assert set(pipeline.predict(images)) <= set(labels)
    assert list(pipeline.classes_) == sorted(set(labels))
    if classifier != "ovr":  # scikit-learn's OneVsRestClassifier loses dtype object
        assert pipeline.classes_.dtype == labels.dtype


# NaN and several labels per image are left to scikit-learn, whose OneVsRestClassifier
# accepts them.
@pytest.mark.parametrize("classifier", ["svm", "softmax", "ovr"])
@pytest.mark.parametrize("kind", INVALID_LABELS)
def test_invalid_labels_are_refused(images, classifier, kind):
    pipeline = make_feature_pipeline("tiny", classifier, image_size=16)

    with pytest.raises((ValueError, TypeError)):
        pipeline.fit(images, INVALID_LABELS[kind])


def test_unknown_classifiers_are_refused():
    with pytest.raises(ValueError, match="svm, softmax, ovr"):
        make_feature_pipeline("tiny", "forest")


def test_random_state_is_passed_to_the_classifier(few_digits):
    X_train, X_test, y_train, _ = few_digits
    seeds = {}
    for name in ("svm", "softmax", "ovr"):
        pipeline = make_feature_pipeline("tiny", name, random_state=3)
        seeds |= {
            f"{name}: {key}": value
            for key, value in pipeline.get_params().items()
            if key.endswith("random_state")
        }
        unseeded = make_feature_pipeline("tiny", name)[-1]
        assert unseeded.get_params().get("random_state") is None

    assert set(seeds.values()) == {3}
    assert "svm: svm__random_state" in seeds
    assert "ovr: ovr__estimator__random_state" in seeds
    found = []
    for seed in (0, 1):
        np.random.seed(seed)  # noqa: NPY002
        pipeline = make_feature_pipeline(
            "tiny", layer="block3", random_state=0, **SMALL
        )
        found.append(pipeline.fit(X_train, y_train).decision_function(X_test[:20]))
    np.testing.assert_array_equal(*found)


def test_random_state_of_an_own_classifier_is_kept_where_it_is_set():
    nested = OneVsRestClassifier(LinearSVC())
    mixed = VotingClassifier([("a", LinearSVC(random_state=5)), ("b", LinearSVC())])

    seeded = make_feature_pipeline("tiny", nested, random_state=3)
    partly = make_feature_pipeline("tiny", mixed, random_state=3)

    assert seeded[-1].estimator.random_state == 3
    assert nested.estimator.random_state is None  # the pipeline has a clone
    params = partly.get_params()
    assert params["classifier__a__random_state"] == 5
    assert params["classifier__b__random_state"] == 3


def test_random_state_may_be_a_generator(few_digits):
    X_train, X_test, y_train, _ = few_digits

    found = [
        make_feature_pipeline("tiny", random_state=np.random.RandomState(7), **SMALL)
        .fit(X_train, y_train)
        .decision_function(X_test[:20])
        for _ in range(2)
    ]

    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("C", [0.1, 1.0])
def test_the_svm_converges_with_less_regularization(C, few_digits):
    """A ConvergenceWarning is an error here."""
    X_train, _, y_train, _ = few_digits
    pipeline = make_feature_pipeline("tiny", random_state=0, **SMALL)

    pipeline.set_params(svm__C=C).fit(X_train, y_train)

    assert pipeline[-1].n_iter_ < pipeline[-1].max_iter


def test_only_one_versus_rest_takes_several_labels_per_image(few_digits):
    X_train, _, y_train, _ = few_digits
    y = np.stack([y_train > 4, y_train % 2], axis=1).astype(int)
    pipelines = {
        name: make_feature_pipeline("tiny", name, layer="block3", **SMALL)
        for name in ("ovr", "svm")
    }

    assert pipelines["ovr"].fit(X_train, y).score(X_train, y) > 0.8
    with pytest.raises(ValueError, match="1d array"):
        pipelines["svm"].fit(X_train, y)
