"""The three classical classifiers, ready to fit."""

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
def test_labels_of_any_kind_come_back(images, classifier, kind):
    labels = np.resize(LABELS[kind], len(images))

    pipeline = make_feature_pipeline("tiny", classifier).fit(images, labels)

    assert set(pipeline.predict(images)) <= set(labels)
    assert list(pipeline.classes_) == sorted(set(labels))
    if classifier != "ovr":  # scikit-learn's OneVsRestClassifier loses the type object
        assert pipeline.classes_.dtype == labels.dtype


# What else is no label (NaN, several for one image) is left to scikit-learn, whose
# OneVsRestClassifier takes it.
@pytest.mark.parametrize("classifier", ["svm", "softmax", "ovr"])
@pytest.mark.parametrize("kind", NO_LABELS)
def test_what_is_no_label_is_refused(images, classifier, kind):
    with pytest.raises((ValueError, TypeError)):
        make_feature_pipeline("tiny", classifier).fit(images, NO_LABELS[kind])


def test_unknown_classifiers_are_refused():
    with pytest.raises(ValueError, match="svm, softmax, ovr"):
        make_feature_pipeline("tiny", "forest")


def test_the_seed_is_that_of_the_classifier_too(digits):
    X_train, X_test, y_train, _ = digits
    seeds = {}
    for name in ("svm", "softmax", "ovr"):
        made = make_feature_pipeline("tiny", name, random_state=3)
        seeds |= {
            f"{name}: {key}": value
            for key, value in made.get_params().items()
            if key.endswith("random_state")
        }
        assert (
            make_feature_pipeline("tiny", name)[-1].get_params().get("random_state")
            is None
        )

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


def test_the_seed_of_an_own_classifier_is_left_where_it_is_set():
    nested = OneVsRestClassifier(LinearSVC())
    mixed = VotingClassifier([("a", LinearSVC(random_state=5)), ("b", LinearSVC())])

    seeded = make_feature_pipeline("tiny", nested, random_state=3)
    partly = make_feature_pipeline("tiny", mixed, random_state=3)

    assert seeded[-1].estimator.random_state == 3
    assert nested.estimator.random_state is None  # it is cloned
    params = partly.get_params()
    assert params["classifier__a__random_state"] == 5
    assert params["classifier__b__random_state"] == 3


def test_a_generator_may_be_passed(digits):
    X_train, X_test, y_train, _ = digits

    found = [
        make_feature_pipeline("tiny", random_state=np.random.RandomState(7), **SMALL)
        .fit(X_train, y_train)
        .decision_function(X_test[:20])
        for _ in range(2)
    ]

    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("C", [0.1, 1.0])
def test_a_machine_that_is_regularized_less_converges(C, images):
    """A ConvergenceWarning is an error here."""
    X, y = load_digits(return_X_y=True)
    pipeline = make_feature_pipeline(
        "tiny", image_shape=(8, 8), image_size=32, random_state=0
    )

    pipeline.set_params(svm__C=C).fit(X[:150] / 16, y[:150])

    assert pipeline[-1].n_iter_ < pipeline[-1].max_iter


def test_several_labels_are_for_one_versus_rest(digits):
    X_train, _, y_train, _ = digits
    y = np.stack([y_train > 4, y_train % 2], axis=1).astype(int)
    pipelines = {
        name: make_feature_pipeline("tiny", name, layer="block3", **SMALL)
        for name in ("ovr", "svm")
    }

    assert pipelines["ovr"].fit(X_train, y).score(X_train, y) > 0.8
    with pytest.raises(ValueError, match="1d array"):
        pipelines["svm"].fit(X_train, y)
