"""Advice, and the transfer classifier, for labels and values."""

import pickle

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import (
    RepeatedStratifiedKFold,
    StratifiedGroupKFold,
    cross_val_score,
)
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from skltl import (
    FineTunedCNNRegressor,
    PretrainedCNNClassifier,
    StrategyAdvisor,
    StrategyDisplay,
    TransferClassifier,
    make_feature_pipeline,
)
from skltl.features import FeatureScaler

N_IMAGES = 90


@pytest.fixture(scope="module")
def rows():
    rows, labels = load_digits(return_X_y=True)
    return rows[:N_IMAGES] / 16, labels[:N_IMAGES]


@pytest.fixture(scope="module")
def labeled(rows):
    """Digits, and whether they are odd, large, and have a hole."""
    X, digits = rows
    holes = np.isin(digits, [0, 6, 8, 9])
    return X, np.column_stack([digits % 2, digits > 4, holes]).astype(int)


@pytest.fixture(scope="module")
def measured(rows):
    """Digits, and the ink in their upper halves."""
    X, _ = rows
    return X, X[:, :32].mean(axis=1)


def folds(n_images):
    """The folds of the advisor without classes."""
    zeros = np.zeros(n_images)
    splitter = RepeatedStratifiedKFold(
        n_splits=5, n_repeats=3, random_state=np.random.RandomState(0)
    )
    return list(splitter.split(zeros, zeros))


def test_scores_of_labels_are_those_of_scikit_learn(labeled, make_transformer):
    X, Y = labeled
    advisor = StrategyAdvisor(make_transformer(), random_state=0).fit(X, Y)

    probe = make_pipeline(
        StandardScaler(),
        MultiOutputClassifier(LinearSVC(C=0.01, max_iter=10_000, random_state=0)),
    )
    for layer, score in advisor.layer_scores_.items():
        features = make_transformer(layer=layer).fit_transform(X)
        scores = [
            accuracy_score(Y[test], clone(probe).fit(*train).predict(features[test]))
            for (train, test) in (
                ((features[train], Y[train]), test) for train, test in folds(N_IMAGES)
            )
        ]
        assert_allclose(score, np.mean(scores), atol=1e-9)
    assert (advisor.task_, advisor.n_classes_) == ("labels", 3)
    rarest = np.minimum(Y.sum(axis=0), N_IMAGES - Y.sum(axis=0)).min()
    assert advisor.n_smallest_ == rarest
    report = advisor.report()
    assert f"90 images, 3 labels, {rarest} images with or without" in report
    assert "all labels right" in report


@pytest.mark.parametrize("n_values", [1, 2])
def test_scores_of_values_are_those_of_scikit_learn(
    n_values, measured, make_transformer
):
    X, y = measured
    if n_values == 2:
        y = np.column_stack([y, X.mean(axis=1)])
    advisor = StrategyAdvisor(make_transformer(), random_state=0).fit(X, y)

    probe = make_pipeline(FeatureScaler(), Ridge(alpha=100))
    for layer, score in advisor.layer_scores_.items():
        features = make_transformer(layer=layer).fit_transform(X)
        scores = cross_val_score(probe, features, y, cv=folds(N_IMAGES))
        assert_allclose(score, scores.mean(), atol=1e-6)
    assert (advisor.task_, advisor.n_classes_) == ("values", n_values)
    assert "R² of ridge regression" in advisor.report()
    assert "percentage points" not in advisor.report()
    estimator = advisor.strategy_.estimator
    assert isinstance(estimator, Pipeline)
    assert (
        r2_score(y, estimator.fit(X, y).predict(X)) > advisor.size_scores_.popitem()[1]
    )


def test_scores_of_values_increase_with_the_number_of_images(
    measured, make_transformer
):
    advisor = StrategyAdvisor(make_transformer(), random_state=0).fit(*measured)
    sizes, scores = zip(*advisor.size_scores_.items(), strict=True)
    assert sizes == (18, 36, 72)
    assert list(scores) == sorted(scores)
    assert scores[-1] <= 1


def test_integers_are_values_if_this_is_said(rows, make_transformer):
    X, digits = rows
    ink = (100 * X.mean(axis=1)).astype(int)
    advisor = StrategyAdvisor(
        make_transformer(), task="regression", cv=2, random_state=0
    )
    advisor.fit(X, ink)
    assert advisor.task_ == "values"
    classes = clone(advisor).set_params(task="auto").fit(X, digits % 3)
    assert classes.task_ == "classes"
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        clone(advisor).set_params(task="classification").fit(X, ink / 100)


def test_many_values_get_a_fine_tuned_regressor(measured, make_transformer):
    X, y = measured
    repeated = np.tile(X, (12, 1)), np.tile(y, 12)
    advisor = StrategyAdvisor(make_transformer(), cv=2, max_images=90, random_state=0)
    strategy = advisor.fit(*repeated).strategy_
    assert strategy.name in ("finetune", "finetune_top")
    assert isinstance(strategy.estimator, FineTunedCNNRegressor)
    assert advisor.n_evaluated_ == 90


def test_groups_and_weights_of_values(measured, make_transformer):
    X, y = measured
    groups = np.arange(N_IMAGES) // 6
    advisor = StrategyAdvisor(make_transformer(), cv=3, random_state=0)
    advisor.fit(X, y, groups=groups)
    features = make_transformer(layer=advisor.best_layer_).fit_transform(X)
    generator, scores = np.random.RandomState(0), []
    for _ in range(3):
        seed = generator.randint(2**31 - 1)
        splitter = StratifiedGroupKFold(3, shuffle=True, random_state=seed)
        for train, test in splitter.split(X, np.zeros(N_IMAGES), groups):
            assert not set(groups[train]) & set(groups[test])
            probe = make_pipeline(FeatureScaler(), Ridge(alpha=100))
            probe.fit(features[train], y[train])
            scores.append(probe.score(features[test], y[test]))
    assert_allclose(advisor.layer_scores_[advisor.best_layer_], np.mean(scores))

    weights = np.ones(N_IMAGES)
    weights[60:] = 0
    weighted = clone(advisor).fit(X, y, weights)
    part = clone(advisor).fit(X[:60], y[:60])
    assert weighted.layer_scores_ == part.layer_scores_
    with pytest.raises(ValueError, match=r"there are 90 images of 1 groups\."):
        advisor.fit(X, y, groups=np.zeros(N_IMAGES))


def test_several_backbones_are_compared_for_values(measured, make_transformer):
    advisor = StrategyAdvisor(
        make_transformer(pooling=2),
        backbones=[make_backbone("tiny"), make_backbone("other")],
        cv=3,
        random_state=0,
    )
    advisor.fit(*measured)
    assert set(advisor.backbone_scores_) == {"tiny", "other"}


def make_backbone(name):
    from skltl.networks import get_backbone

    if name == "tiny":
        return "tiny"
    from torch import nn

    from skltl import Backbone

    preprocessing = get_backbone("tiny").preprocessing
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    return Backbone.from_module(name, module, preprocessing=preprocessing)


@pytest.mark.parametrize("strategy", ["auto", "extract", "extract_early", "finetune"])
def test_labels_are_classified_by_every_strategy(strategy, labeled, make_transformer):
    X, Y = labeled
    classifier = TransferClassifier(
        make_transformer(), strategy=strategy, cv=2, random_state=0
    ).fit(X, Y)
    assert classifier.multilabel_
    assert_array_equal(classifier.classes_, [0, 1, 2])
    predicted = classifier.predict(X)
    assert predicted.shape == Y.shape
    assert classifier.score(X, Y) == (predicted == Y).all(axis=1).mean()
    assert classifier.score(X, Y) > 0.8
    assert_array_equal(predicted, classifier.decision_function(X) > 0)
    loaded = pickle.loads(pickle.dumps(classifier))
    assert_array_equal(loaded.predict(X), predicted)
    if strategy == "extract":
        assert_array_equal(predicted, classifier.predict_proba(X) > 0.5)
        by_hand = make_feature_pipeline(
            "tiny", "softmax", image_shape=(8, 8), image_size=32, random_state=0
        )
        assert_array_equal(by_hand.fit(X, Y).predict(X), predicted)


def test_classes_and_values_are_refused_where_they_make_no_sense(
    labeled, measured, make_transformer
):
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        TransferClassifier(make_transformer()).fit(*measured)
    pretrained = PretrainedCNNClassifier(
        "tiny", class_map="learn", image_shape=(8, 8), image_size=32
    )
    with pytest.raises(ValueError, match="one class of each image"):
        pretrained.fit(*labeled)


def test_the_display_shows_labels_and_values(labeled, measured, make_transformer):
    for (X, y), text in ((labeled, "90 images, 3 labels"), (measured, "90 images")):
        advisor = StrategyAdvisor(make_transformer(), cv=2, random_state=0).fit(X, y)
        display = StrategyDisplay.from_advisor(advisor)
        assert text in [one.get_text() for one in display.ax_.texts]
