"""Pipelines of a transformer and a linear model."""

import pickle
from functools import partial

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.ensemble import VotingClassifier
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR, LinearSVC

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


@pytest.mark.filterwarnings("ignore:Label 3 is present in all:UserWarning")
@pytest.mark.filterwarnings("ignore:Label not 4 is present in all:UserWarning")
@pytest.mark.parametrize("classifier", ["svm", "softmax", "ovr"])
def test_every_classifier_takes_labels(few_digits, classifier):
    """As one model for each label does."""
    X_train, X_test, y_train, y_test = few_digits
    labels, test_labels = (
        np.column_stack([y % 2 == 0, y > 4, y == 3, y > -1, y > 9]).astype(int)
        for y in (y_train, y_test)
    )
    pipeline = make_feature_pipeline("tiny", classifier, layer="block3", **SMALL)
    one = make_feature_pipeline("tiny", classifier, layer="block3", **SMALL)
    pipeline.fit(X_train, labels)

    predicted = pipeline.predict(X_test)

    assert (
        pipeline.score(X_test, test_labels) == (predicted == test_labels).all(1).mean()
    )
    for column in range(3):
        alone = one.fit(X_train, labels[:, column])
        np.testing.assert_array_equal(predicted[:, column], alone.predict(X_test))
        if classifier == "softmax":
            np.testing.assert_allclose(
                pipeline.predict_proba(X_test)[:, column],
                alone.predict_proba(X_test)[:, 1],
                rtol=1e-6,
            )
    np.testing.assert_array_equal(predicted[:, 3:], test_labels[:, 3:])
    saved = pickle.loads(pickle.dumps(pipeline))
    np.testing.assert_array_equal(saved.predict(X_test), predicted)


@pytest.mark.parametrize("classifier", ["svm", "softmax"])
def test_weights_of_labels_count_as_repetitions(few_digits, classifier):
    X, _, y, _ = few_digits
    X, y = X[:60], y[:60]
    labels = np.column_stack([y % 2 == 0, y > 4]).astype(int)
    weights = np.random.default_rng(0).integers(0, 3, len(y))
    pipeline = make_feature_pipeline("tiny", classifier, layer="block3", **SMALL)
    if classifier == "softmax":  # the default solver ends before it is exact
        # In float32, gradients do not become much smaller.
        pipeline.set_params(softmax__solver="newton-cholesky", softmax__tol=1e-6)
    else:
        pipeline.set_params(svm__tol=1e-8)
    metadata = {f"{name}__sample_weight": weights for name in ("scale", classifier)}

    found = clone(pipeline).fit(X, labels, **metadata).decision_function(X)

    repeated = np.repeat(np.arange(len(y)), weights)
    expected = clone(pipeline).fit(X[repeated], labels[repeated]).decision_function(X)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    unweighted = clone(pipeline).fit(X, labels).decision_function(X)
    assert abs(unweighted - expected).max() > 0.05


def test_classes_and_labels_may_alternate(few_digits):
    """Nothing of one fit is left in the next."""
    X, _, y, _ = few_digits
    labels = np.column_stack([y % 2 == 0, y > 4]).astype(int)
    pipeline = make_feature_pipeline("tiny", "softmax", layer="block3", **SMALL)
    expected = [
        clone(pipeline).fit(X, targets).predict_proba(X) for targets in (y, labels)
    ]

    for targets, proba in zip((y, labels, y), (*expected, expected[0]), strict=True):
        found = pipeline.fit(X, targets).predict_proba(X)
        np.testing.assert_allclose(found, proba, rtol=1e-6)


def test_ridge_predicts_values(few_digits):
    """Here, whether a digit is a 0: with the squared loss that is a value, too."""
    X_train, X_test, y_train, y_test = few_digits
    pipeline = make_feature_pipeline("tiny", regressor="ridge", layer="block3", **SMALL)
    is_zero = (y_train == 0).astype(float)

    both = pipeline.fit(X_train, np.column_stack([is_zero, -is_zero])).predict(X_test)
    alone = pipeline.fit(X_train, is_zero)

    assert list(pipeline.named_steps) == ["feat", "scale", "ridge"]
    assert alone.score(X_test, y_test == 0) > 0.4
    np.testing.assert_allclose(both[:, 0], alone.predict(X_test), atol=1e-6)
    np.testing.assert_allclose(both[:, 1], -both[:, 0], atol=1e-6)
    svr = make_feature_pipeline("tiny", regressor=SVR(), **SMALL)
    assert list(svr.named_steps) == ["feat", "scale", "regressor"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classifier": "tree"}, "Unknown classifier 'tree'. Use one of svm, softmax"),
        ({"regressor": "tree"}, "Unknown regressor 'tree'. Use one of ridge, or an"),
        ({"classifier": "svm", "regressor": "ridge"}, "exclude each other"),
    ],
)
def test_other_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_feature_pipeline("tiny", **arguments)


def test_features_that_hardly_vary_are_not_magnified():
    """Of digits that are rotated, some features are 0 for almost all images."""
    X, y = load_digits(return_X_y=True)
    angles = np.random.default_rng(0).uniform(-45, 45, size=len(X))
    rotated = [
        np.asarray(Image.fromarray(row.reshape(8, 8).astype("f4")).rotate(angle, 2))
        for row, angle in zip(X / 16, angles, strict=True)
    ]
    rows = np.clip(rotated, 0, 1).reshape(len(X), 64)
    train, test = train_test_split(
        np.arange(len(X)), train_size=300, stratify=y, random_state=0
    )
    ridge = make_feature_pipeline("tiny", regressor="ridge", layer="block3", **SMALL)
    ridge.fit(rows[train], angles[train])

    scales = ridge["scale"].scale_
    usual = StandardScaler().fit(ridge["feat"].transform(rows[train])).scale_

    np.testing.assert_allclose(scales, np.maximum(usual, 0.1 * np.median(usual)))
    assert usual.min() < 0.001 * np.median(usual)
    assert ridge.score(rows[test], angles[test]) > 0.8


@pytest.mark.parametrize("name", ["svm", "softmax"])
def test_a_fit_to_labels_keeps_parameters_and_nothing_of_an_earlier_fit(name):
    rng = np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(30, 4)), columns=list("abcd"))
    Y = np.column_stack([X["a"] > 0, X["b"] > 0.5, np.ones(30)]).astype(int)
    generator = np.random.RandomState(0)
    model = make_feature_pipeline("tiny", name)[-1].set_params(random_state=generator)

    model.fit(X, Y)

    assert model.random_state is generator
    alone = [clone(model).fit(X, labels) for labels in Y.T[:2]]
    assert_allclose(model.coef_[:2], np.vstack([one.coef_ for one in alone]))
    assert_array_equal(model.n_iter_, np.max([one.n_iter_ for one in alone], axis=0))
    assert_array_equal(model.feature_names_in_, list("abcd"))
    assert_array_equal(model.predict(X)[:, 2], 1)
    constant = model.fit(X.to_numpy(), np.ones((30, 2), dtype=int))
    assert not hasattr(constant, "feature_names_in_")
    assert not model.fit(X, Y[:, 0]).multilabel_
    assert_allclose(model.coef_, alone[0].coef_)


@pytest.mark.parametrize("n_values", [1, 2])
def test_values_with_a_large_offset_are_predicted(few_digits, n_values):
    """Features in float32 must not round the values to float32."""
    X, X_test, _, _ = few_digits
    make = partial(make_feature_pipeline, "tiny", regressor="ridge", **SMALL)

    def values(X):
        return np.column_stack([X.mean(axis=1), X[:, :32].mean(axis=1)])[:, :n_values]

    near = make().fit(X, values(X).squeeze())
    far = make().fit(X, values(X).squeeze() + 1.7e9)

    expected = near.predict(X_test)
    assert_allclose(far.predict(X_test) - 1.7e9, expected, atol=1e-3)
    plain = Ridge(alpha=100)
    features = near[:-1].transform(X).astype(float), near[:-1].transform(X_test)
    plain.fit(features[0], values(X).squeeze())
    assert_allclose(expected, plain.predict(features[1]), atol=1e-3)


@pytest.mark.parametrize("name", ["svm", "softmax", "ovr"])
def test_indicators_of_nullable_types(few_digits, name):
    X, _, y, _ = few_digits
    Y = pd.DataFrame({"odd": y % 2, "large": y // 5}).convert_dtypes()
    found, expected = (
        make_feature_pipeline("tiny", name, **SMALL).fit(X, labels).predict(X)
        for labels in (Y, Y.to_numpy(int))
    )
    assert_array_equal(found, expected)
