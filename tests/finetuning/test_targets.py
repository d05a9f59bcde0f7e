"""Other targets than one class: any number of labels, or values."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from plain_loop import plain_losses
from scipy.sparse import csr_array
from scipy.special import expit
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR
from tiny_classifier import NETWORK, classifier, losses, regressor

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    FineTunedCNNRegressor,
    make_feature_pipeline,
)
from skltl.features import FeatureScaler
from skltl.finetuning._data import hold_out
from skltl.finetuning._objective import PROBE_ALPHA, StandardizedError

CONSTANT = {"schedule": "constant", "batch_size": 23}
SGD = partial(torch.optim.SGD, momentum=0.9, nesterov=True)


@pytest.fixture(scope="session")
def labeled(digits):
    """Digits, and which of three properties each of them has."""
    X, y = digits[0][:120], digits[1][:120]
    return X, np.column_stack([y % 2 == 0, y > 4, y == 3]).astype(int)


@pytest.fixture(scope="session")
def measured(digits):
    """Digits, and their ink in total and in the upper half, in odd units."""
    rows = digits[0][:300]
    return rows, np.column_stack(
        [rows.sum(axis=1) * 1000, rows[:, :32].sum(axis=1) - 9]
    )


class Several:
    """Linear models of one output each, as one of several outputs."""

    def __init__(self, model):
        self.model = model

    def fit(self, X, Y):
        models = [copy.deepcopy(self.model).fit(X, y) for y in Y.T]
        self.coef_ = np.vstack([model.coef_ for model in models])
        self.intercept_ = np.hstack([model.intercept_ for model in models])
        return self


class Probe:
    """A scaler and a model, fitted one after the other."""

    def __init__(self, model, scaler=StandardScaler):
        self.model = model
        self.scaler = scaler

    def fit(self, X, y):
        scaler = self.scaler().fit(X)
        return scaler, self.model.fit(scaler.transform(X), y)


def test_losses_of_labels_are_those_of_a_plain_loop(labeled):
    X, Y = labeled[0][:70], labeled[1][:70]
    fitted = classifier(label_smoothing=0.1, backbone_lr=1e-3, **CONSTANT).fit(X, Y)

    def loss(outputs, targets):
        targets = 0.9 * targets + 0.05
        return -(
            targets * torch.sigmoid(outputs).log()
            + (1 - targets) * torch.sigmoid(-outputs).log()
        ).mean()

    probe = Probe(Several(LogisticRegression(C=0.1, max_iter=1000)))
    decay = 1 / (0.1 * 70 * 3)  # that of the probe
    expected = plain_losses(
        *(X, Y.astype(np.float32), probe, loss, SGD, 0.01, 0.001, decay)
    )

    assert_allclose(losses(fitted), expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["squared_error", "huber"])
@pytest.mark.parametrize("n_outputs", [1, 2])
def test_losses_of_values_are_those_of_a_plain_loop(name, n_outputs, measured):
    X, Y = measured[0][:70], measured[1][:70, :n_outputs]
    fitted = regressor(loss=name, backbone_lr=1e-4, **CONSTANT).fit(X, Y)

    def loss(outputs, targets):
        error = (outputs - targets).abs()
        squared = error**2
        if name == "squared_error":
            return squared.mean()
        return torch.where(error < 1, squared / 2, error - 0.5).mean()

    standardized = ((Y - Y.mean(axis=0)) / Y.std(axis=0)).astype(np.float32)
    decay = 2 * 100 / (70 * n_outputs)  # that of the probe
    expected = plain_losses(
        *(
            X,
            standardized,
            Probe(Ridge(100), FeatureScaler),
            loss,
            SGD,
            0.01,
            1e-4,
            decay,
        )
    )

    assert_allclose(losses(fitted), expected, rtol=1e-4)


def test_labels_are_predicted_by_their_probabilities(labeled):
    X, Y = labeled
    fitted = classifier(validation_fraction=0.25).fit(X, Y)

    decisions, proba = fitted.decision_function(X), fitted.predict_proba(X)

    assert fitted.multilabel_
    assert_array_equal(fitted.classes_, [0, 1, 2])
    assert_allclose(proba, expit(decisions))
    assert_array_equal(fitted.predict(X), proba > 0.5)
    assert fitted.score(X, Y) == accuracy_score(Y, fitted.predict(X))
    assert fitted.score(X, Y) > 0.9
    assert fitted.history_[-1]["validation_score"] > 0.7


def test_values_are_predicted_in_their_units(measured):
    X, Y = measured
    fitted = regressor(validation_fraction=0.25).fit(X, Y)
    alone = regressor().fit(X, Y[:, 0])

    assert fitted.n_outputs_ == 2
    assert fitted.predict(X).shape == Y.shape
    assert alone.predict(X).shape == (300,)
    assert fitted.score(X, Y) == pytest.approx(r2_score(Y, fitted.predict(X)))
    assert fitted.score(X, Y) > 0.7
    assert alone.score(X, Y[:, 0]) > 0.7
    offset = fitted.predict(X).mean(axis=0) - Y.mean(axis=0)
    assert (np.abs(offset) < 0.2 * Y.std(axis=0)).all()


def test_the_score_of_an_epoch_is_that_of_scikit_learn(labeled, measured):
    """Of the last epoch, after which nothing changes."""
    options = {"head_epochs": 1, "finetune_epochs": 0, "validation_fraction": 0.25}
    for build, (X, Y) in ((classifier, labeled), (regressor, measured)):
        fitted = build(**options).fit(X, Y)
        weights = np.random.default_rng(0).uniform(1, 2, len(X))
        weighted = build(**options).fit(X, Y, weights)

        for one, w in ((fitted, None), (weighted, weights)):
            found = one.history_[-1]["validation_score"]
            scores = []
            for rows in held_out(one, X, Y, w):
                part = None if w is None else w[rows]
                scores.append(one.score(X[rows], Y[rows], part))
            assert found == pytest.approx(scores[0], abs=1e-6)


def held_out(estimator, X, Y, weights):
    yield hold_out(np.asarray(Y, dtype=float), None, 0.25, 0)[1]


@pytest.mark.parametrize("kind", ["labels", "values"])
def test_the_probe_is_the_linear_model_of_a_pipeline(kind, labeled, measured):
    """Without epochs, the network predicts what features and a linear model do."""
    transformer = CNNFeatureTransformer("tiny", **NETWORK, precision="float32")
    if kind == "labels":
        (X, Y), build = labeled, classifier
        last = OneVsRestClassifier(LogisticRegression(C=0.1, max_iter=1000))
    else:
        (X, Y), build = measured, regressor
        Y = (Y - Y.mean(axis=0)) / Y.std(axis=0)
        last = Ridge(100)
    scaler = StandardScaler() if kind == "labels" else FeatureScaler()
    pipeline = make_pipeline(transformer, scaler, last).fit(X, Y)

    fitted = build(unfreeze=None, head_epochs=0).fit(X, Y)

    method = "predict_proba" if kind == "labels" else "predict"
    found, expected = (getattr(one, method)(X) for one in (fitted, pipeline))
    assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["labels", "values", "value"])
def test_a_pipeline_becomes_a_network_and_is_trained_on(kind, labeled, measured):
    X, Y = labeled if kind == "labels" else measured
    Y = Y[:, 0] if kind == "value" else Y
    last = "ovr" if kind == "labels" else Ridge(10)
    pipeline = make_feature_pipeline("tiny", last, **NETWORK).fit(X, Y)
    cls = FineTunedCNNClassifier if kind == "labels" else FineTunedCNNRegressor

    made = cls.from_pipeline(pipeline, finetune_epochs=2, random_state=0)
    method = "predict_proba" if kind == "labels" else "predict"
    found, expected = (getattr(one, method)(X) for one in (made, pipeline))
    untrained = cls(**{**made.get_params(), "finetune_epochs": 0}).fit(X, Y)
    trained = made.fit(X, Y)

    scale = np.abs(expected).max()
    assert_allclose(found, expected, atol=1e-5 * scale)
    assert_allclose(getattr(untrained, method)(X), expected, atol=1e-3 * scale)
    assert trained.score(X, Y) >= pipeline.score(X, Y) - 0.05


def test_models_of_other_targets_are_refused(labeled, measured):
    (X, Y), values = labeled, measured[1][:120]
    labels = make_feature_pipeline("tiny", "ovr", **NETWORK).fit(X, Y)
    numbers = make_feature_pipeline("tiny", Ridge(), **NETWORK).fit(X, values)

    with pytest.raises(ValueError, match="Ridge is not a linear classifier"):
        FineTunedCNNClassifier.from_pipeline(numbers)
    with pytest.raises(ValueError, match="OneVsRestClassifier is not a linear regres"):
        FineTunedCNNRegressor.from_pipeline(labels)
    with pytest.raises(ValueError, match="OneVsRestClassifier is not a fitted regres"):
        regressor(head_init=FrozenEstimator(labels[-1])).fit(X, values)
    with pytest.raises(ValueError, match=r"head_init: the classes are \[0, 1, 2\]"):
        classifier(head_init=FrozenEstimator(numbers[-1])).fit(X, Y)
    with pytest.raises(ValueError, match=r"outputs of the fitted model: 2, of y: 1"):
        FineTunedCNNRegressor.from_pipeline(numbers).fit(X, values[:, 0])


@pytest.mark.parametrize("kind", ["labels", "values"])
def test_saved_estimators_predict_the_same(kind, labeled, measured):
    (X, Y), build = (labeled, classifier) if kind == "labels" else (measured, regressor)
    fitted = build().fit(X, Y)

    loaded = pickle.loads(pickle.dumps(fitted))

    assert_array_equal(loaded.predict(X), fitted.predict(X))
    assert loaded.score(X, Y) == fitted.score(X, Y)


def test_a_warm_start_continues_in_other_units(measured):
    """The head keeps predicting what it did, whatever the new mean and scale are."""
    X, Y = measured
    fitted = regressor().fit(X, Y)
    before = fitted.predict(X)

    again = fitted.set_params(warm_start=True, head_epochs=0, finetune_epochs=0)
    again.fit(X[:60], Y[:60])

    assert_allclose(again.predict(X), before, rtol=1e-4, atol=1e-2)


def test_balanced_labels_are_those_of_a_balanced_one_vs_rest(labeled):
    X, Y = labeled
    transformer = CNNFeatureTransformer("tiny", **NETWORK, precision="float32")
    last = LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced")
    pipeline = make_pipeline(transformer, StandardScaler(), OneVsRestClassifier(last))

    options = {"class_weight": "balanced", "unfreeze": None}
    probe = classifier(**options, head_epochs=0).fit(X, Y)
    trained = classifier(**options, batch_size=120, head_epochs=1).fit(X, Y)

    proba = pipeline.fit(X, Y).predict_proba(X)
    assert_allclose(probe.predict_proba(X), proba, atol=1e-4)
    share = Y.mean(axis=0)
    weights = np.where(Y == 1, 0.5 / share, 0.5 / (1 - share))
    surprise = -np.log(np.where(Y == 1, proba, 1 - proba))
    assert losses(trained) == [pytest.approx((weights * surprise).mean(), rel=1e-3)]


def test_a_label_that_all_images_have_is_predicted(labeled):
    X, Y = labeled[0], labeled[1].copy()
    Y[:, 1], Y[:, 2] = 1, 0

    fitted = classifier().fit(X, Y)

    assert_array_equal(fitted.predict(X)[:, 1:], Y[:, 1:])


def test_constant_values_are_predicted(measured):
    X = measured[0]
    Y = np.column_stack([np.full(300, 1e9), measured[1][:, 0]])

    fitted = regressor().fit(X, Y)

    assert_allclose(fitted.predict(X)[:, 0], 1e9, rtol=1e-6)
    assert r2_score(Y[:, 1], fitted.predict(X)[:, 1]) > 0.7


def test_huber_is_less_sensitive_to_outliers(measured):
    X, y = measured[0], measured[1][:, 1]
    wrong = y.copy()
    wrong[::20] += 200

    options = {"unfreeze": None, "head_epochs": 40}
    squared, huber = (
        r2_score(y, regressor(loss=name, **options).fit(X, wrong).predict(X))
        for name in ("squared_error", "huber")
    )

    assert huber > squared


def test_groups_of_other_targets_are_held_out_as_a_whole(labeled, measured):
    for build, (X, Y) in ((classifier, labeled), (regressor, measured)):
        groups = np.arange(len(X)) // 10
        options = {"head_epochs": 1, "unfreeze": None, "validation_fraction": 0.25}
        fitted = build(**options).fit(X, Y, groups=groups)

        _, validation = hold_out(np.asarray(Y, dtype=float), groups, 0.25, 0)
        assert_array_equal(np.unique(groups[validation], return_counts=True)[1], 10)
        score = fitted.score(X[validation], Y[validation])
        assert fitted.history_[0]["validation_score"] == pytest.approx(score, abs=1e-4)

        with pytest.raises(ValueError, match="too few to hold some out, with a total"):
            build(**options).fit(X, Y, groups=np.zeros(len(X)))


def test_weights_count_as_repetitions(measured):
    """Of the probe, which has no batches: weights 2 are images twice.

    Only their ratios count, so that the penalty is that of as many images.
    """
    X, Y = measured[0][:40], measured[1][:40]
    weights = np.arange(40) % 3
    rows = np.repeat(np.arange(40), weights)
    transformer = CNNFeatureTransformer("tiny", **NETWORK, precision="float32")
    features = transformer.fit_transform(X)
    alpha = PROBE_ALPHA * len(rows) / np.count_nonzero(weights)
    repeated = make_pipeline(FeatureScaler(), Ridge(alpha))
    expected = repeated.fit(features[rows], Y[rows]).predict(features)

    found = regressor(unfreeze=None, head_epochs=0).fit(X, Y, weights).predict(X)

    scale = Y.std(axis=0)
    assert_allclose(found / scale, expected / scale, atol=1e-3)


@pytest.mark.parametrize("kind", ["classes", "labels", "values"])
@pytest.mark.parametrize(
    "options",
    [
        {"unfreeze": None, "head_epochs": 0},
        {"head_epochs": 1, "finetune_epochs": 1, "unfreeze": 1},
        {"head_epochs": 1, "unfreeze": None, "validation_fraction": 0.2},
    ],
    ids=["probe", "fine-tuned", "validated"],
)
def test_images_of_weight_0_are_left_out(kind, options, labeled, measured):
    X, Y = measured if kind == "values" else labeled
    X, Y = X[:60], Y[:60]
    if kind == "classes":
        Y = Y[:, 0]
        options = {**options, "class_weight": "balanced"}
    make = regressor if kind == "values" else classifier
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 3, 60)
    noise = rng.random(X.shape).astype(X.dtype)
    spoiled = np.where((weights > 0)[:, None], X, noise)
    kept = weights > 0

    found = make(**options).fit(spoiled, Y, weights)
    expected = make(**options).fit(X[kept], Y[kept], weights[kept])

    method = "predict" if kind == "values" else "predict_proba"
    found, expected = (getattr(one, method)(X) for one in (found, expected))
    scale = expected.std(axis=0)
    assert_allclose(found / scale, expected / scale, atol=1e-3)


def test_a_class_without_weight_remains_a_class(labeled):
    X, Y = labeled
    y = Y[:, 0] + 2 * (np.arange(len(X)) % 10 == 0)
    fitted = classifier(unfreeze=None, head_epochs=1).fit(X, y, y < 2)

    assert_array_equal(fitted.classes_, np.unique(y))
    assert fitted.predict_proba(X)[:, 2:].max() < 0.1


def test_sparse_and_other_indicators_are_the_same(labeled):
    X, Y = labeled
    options = {"unfreeze": None, "head_epochs": 1}
    expected = classifier(**options).fit(X, Y).predict_proba(X)

    for indicators in (csr_array(Y), Y.astype(bool), Y.astype(float)):
        found = classifier(**options).fit(X, indicators).predict_proba(X)
        assert_array_equal(found, expected)


def test_cross_validation_scores_other_targets(labeled, measured):
    options = {"unfreeze": None, "head_epochs": 0}

    assert cross_val_score(classifier(**options), *labeled, cv=3).mean() > 0.7
    assert cross_val_score(regressor(**options), *measured, cv=3).mean() > 0.5


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "requires y to be passed"),
        (np.full(300, np.nan), "Input y contains NaN"),
        (np.ones(299), "inconsistent numbers of samples"),
        (np.ones((300, 2, 2)), "dim 3"),
        (np.array(["a"] * 300), "could not convert string"),
    ],
)
def test_values_that_are_no_numbers_are_refused(y, message, measured):
    with pytest.raises(ValueError, match=message):
        regressor().fit(measured[0], y)


def test_weights_of_classes_need_classes(labeled):
    with pytest.raises(ValueError, match="class_weight: a dict has weights of classes"):
        classifier(class_weight={0: 2}).fit(*labeled)


def test_logarithms_of_probabilities(labeled, digits):
    X, Y = labeled
    several = classifier(head_epochs=1, unfreeze=None).fit(X, Y)
    one = classifier(head_epochs=1, unfreeze=None).fit(X, digits[1][:120])

    for fitted in (several, one):
        proba = fitted.predict_proba(X)
        assert_allclose(np.exp(fitted.predict_log_proba(X)), proba, atol=1e-12)


@pytest.mark.parametrize("monitor", ["score", "loss"])
def test_early_stopping_keeps_the_best_epoch_of_what_is_monitored(monitor, labeled):
    X, Y = labeled
    options = {"validation_fraction": 0.2, "unfreeze": None, "head_epochs": 20}
    fitted = classifier(
        early_stopping=True, monitor=monitor, patience=4, **options
    ).fit(X, Y)
    losses = [one["validation_loss"] for one in fitted.history_]
    scores = [one["validation_score"] for one in fitted.history_]

    held_out = np.setdiff1d(np.arange(120), training_of(fitted, Y))
    kept = classifier_loss(fitted, X[held_out], Y[held_out])

    if monitor == "loss":
        assert kept <= min(losses) + 1e-6
        before = losses[: len(losses) - 4]
        assert len(losses) == 20 or min(losses[-4:]) >= min(before)
    else:
        assert fitted.best_validation_score_ >= max(scores) - 1e-9


def training_of(fitted, Y):
    return hold_out(np.asarray(Y, dtype=float), None, fitted.validation_fraction, 0)[0]


def classifier_loss(fitted, X, Y):
    log_proba = fitted.predict_log_proba(X)
    log_absent = np.log1p(-np.exp(log_proba))
    return -np.where(Y == 1, log_proba, log_absent).mean()


def test_hidden_layers_have_the_weight_decay_that_was_asked_for(measured):
    """That of the probe is for a head that begins as the probe."""
    X, Y = measured[0][:60], measured[1][:60]
    options = {"unfreeze": None, "head_epochs": 3, "weight_decay": 0.0}
    hidden = regressor(hidden_units=(8,), **options).fit(X, Y)
    plain = regressor(hidden_units=(8,), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StandardizedError, "head_decay", lambda self, n: 0.0)
        plain.fit(X, Y)

    assert_array_equal(hidden.predict(X), plain.predict(X))


def test_patience_counts_from_the_epoch_that_is_kept(labeled):
    """A lower loss at the same score is better, too."""
    rng = np.random.default_rng(0)
    Y = rng.integers(0, 2, (120, 25))  # of which all are never right
    fitted = classifier(
        early_stopping=True,
        validation_fraction=0.1,
        patience=2,
        unfreeze=None,
        head_epochs=8,
        head_init="random",
        head_lr=1e-3,
        schedule="constant",
    ).fit(labeled[0], Y)

    falling = np.diff([one["validation_loss"] for one in fitted.history_]) < 0
    assert {one["validation_score"] for one in fitted.history_} == {0.0}
    assert falling[:3].all()
    assert fitted.n_epochs_ > 3


def test_at_least_two_values_are_held_out(measured):
    X, Y = measured[0][:12], measured[1][:12, 0]

    fitted = regressor(early_stopping=True, head_epochs=2, unfreeze=None).fit(X, Y)

    assert np.isfinite(fitted.history_[0]["validation_score"])
    assert fitted.best_validation_score_ is not None


@pytest.mark.parametrize("values", [(-1, 1), (1, 2), (0, 2)])
def test_indicators_are_0_and_1(values, labeled):
    X, Y = labeled
    absent, present = values
    odd = np.where(Y == 1, present, absent)

    for model in (classifier(), make_feature_pipeline("tiny", "softmax", **NETWORK)):
        with pytest.raises(ValueError, match="An indicator matrix has the values 0"):
            model.fit(X, odd)


def test_other_linear_regressors_become_networks(measured):
    X, Y = measured[0][:60], measured[1][:60]
    for last, targets in (
        (SVR(kernel="linear"), Y[:, 0]),
        (MultiOutputRegressor(Ridge(10)), Y),
    ):
        pipeline = make_feature_pipeline("tiny", regressor=last, **NETWORK)
        expected = pipeline.fit(X, targets).predict(X)

        found = FineTunedCNNRegressor.from_pipeline(pipeline).predict(X)

        assert found.shape == expected.shape
        assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_values_that_overflow_are_refused(measured):
    with pytest.raises(ValueError, match="too large for their variance"):
        regressor().fit(measured[0], measured[1] * 1e200)
