"""Advice, and the transfer classifier, for labels and values."""

import pickle
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import (
    RepeatedStratifiedKFold,
    StratifiedGroupKFold,
)
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNRegressor,
    PretrainedCNNClassifier,
    StrategyAdvisor,
    StrategyDisplay,
    TransferClassifier,
    make_feature_pipeline,
    recommend_strategy,
)
from skltl.features import FeatureScaler
from skltl.strategy._tasks import Regression

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
        right = [
            clone(probe).fit(features[train], Y[train]).predict(features[test])
            == Y[test]
            for train, test in folds(N_IMAGES)
        ]
        assert_allclose(score, np.mean([one.mean() for one in right]), atol=1e-9)
    assert (advisor.targets_, advisor.n_classes_) == ("labels", 3)
    rarest = np.minimum(Y.sum(axis=0), N_IMAGES - Y.sum(axis=0)).min()
    assert advisor.n_smallest_ == rarest
    report = advisor.report()
    assert f"90 images, 3 labels, {rarest} images with or without" in report
    assert "mean over the labels" in report


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
        # The variance is that of all images, not of a fold.
        errors = [
            (
                (
                    clone(probe).fit(features[train], y[train]).predict(features[test])
                    - y[test]
                )
                ** 2
            ).mean(axis=0)
            for train, test in folds(N_IMAGES)
        ]
        assert_allclose(score, 1 - np.mean(errors / y.var(axis=0)), atol=1e-6)
    assert (advisor.targets_, advisor.n_classes_) == ("values", n_values)
    assert "R² of ridge regression" in advisor.report()
    assert "percentage points" not in advisor.report()
    estimator = advisor.strategy_.estimator
    assert isinstance(estimator, Pipeline)
    assert (
        r2_score(y, estimator.fit(X, y).predict(X)) > advisor.size_scores_.popitem()[1]
    )


@pytest.mark.parametrize("n_values", [1, 2])
def test_the_score_of_weighted_values_is_that_of_scikit_learn(n_values):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(50, n_values)).squeeze()
    predicted = y + rng.normal(size=y.shape)
    weights = rng.random(50) ** 4
    task = Regression()
    targets = task.encode(y, 50, weights)

    found = task.score(targets, predicted, weights)

    assert found == pytest.approx(r2_score(y, predicted, sample_weight=weights))


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
    assert advisor.targets_ == "values"
    classes = clone(advisor).set_params(task="auto").fit(X, digits % 3)
    assert classes.targets_ == "classes"
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
            errors = (probe.predict(features[test]) - y[test]) ** 2
            scores.append(1 - errors.mean() / y.var())
    assert_allclose(advisor.layer_scores_[advisor.best_layer_], np.mean(scores))

    weights = np.ones(N_IMAGES)
    weights[60:] = 0
    weighted = clone(advisor).fit(X, y, weights)
    part = clone(advisor).fit(X[:60], y[:60])
    assert weighted.layer_scores_ == part.layer_scores_
    with pytest.raises(ValueError, match="a single group of images"):
        advisor.fit(X, y, groups=np.zeros(N_IMAGES))


def test_groups_and_weights_of_labels(labeled, make_transformer):
    X, Y = labeled
    groups = np.arange(N_IMAGES) // 6
    weights = np.where(np.arange(N_IMAGES) < 60, 1.0, 0.0)
    for make in (
        lambda: StrategyAdvisor(make_transformer(), cv=3, random_state=0),
        lambda: TransferClassifier(make_transformer(), cv=3, random_state=0),
    ):
        weighted = make().fit(X, Y, sample_weight=weights, groups=groups)
        part = make().fit(X[:60], Y[:60], groups=groups[:60])
        other = make().fit(X, Y, groups=groups)
        advisors = [getattr(one, "advisor_", one) for one in (weighted, part, other)]
        scores = [advisor.layer_scores_ for advisor in advisors]
        assert scores[0] == scores[1] != scores[2]
    assert_allclose(weighted.decision_function(X), part.decision_function(X), atol=1e-4)
    assert abs(other.decision_function(X) - part.decision_function(X)).max() > 0.1
    with pytest.raises(ValueError, match="a single group of images"):
        make().fit(X, Y, groups=np.zeros(N_IMAGES))


def test_few_values_have_scores_that_can_be_compared(make_transformer, measured):
    """R² of each fold would be far below zero: its own variance is small."""
    X, y = measured
    for n_images in (4, 10):
        advisor = StrategyAdvisor(make_transformer(), random_state=0)
        scores = advisor.fit(X[:n_images], y[:n_images]).layer_scores_.values()
        assert all(-2 < score < 1 for score in scores)
    with pytest.raises(ValueError, match="same value for all"):
        advisor.fit(X, np.full(N_IMAGES, 0.5))


def test_a_value_that_does_not_vary_is_ignored(make_transformer, measured):
    X, y = measured
    fitted = [
        StrategyAdvisor(make_transformer(), cv=2, random_state=0).fit(X, targets)
        for targets in (y, np.column_stack([y, np.full(N_IMAGES, 0.5)]))
    ]
    for layer, score in fitted[0].layer_scores_.items():
        assert_allclose(fitted[1].layer_scores_[layer], score, rtol=1e-5)


def test_images_that_cannot_be_read_are_named(image_files, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    advisor = StrategyAdvisor(CNNFeatureTransformer("tiny", on_error="nan"))
    with pytest.raises(ValueError, match="Image 5 could not be read.*drop_bad"):
        advisor.fit([*image_files[:5], bad], [0, 1] * 3)


def test_a_label_that_all_images_have_is_ignored(labeled, make_transformer):
    X, Y = labeled
    constant = np.column_stack([Y, np.ones(N_IMAGES, int)])
    fitted = [
        StrategyAdvisor(make_transformer(), cv=2, random_state=0).fit(X, targets)
        for targets in (Y, constant)
    ]
    assert fitted[0].n_smallest_ == fitted[1].n_smallest_
    assert fitted[0].strategy_.name == fitted[1].strategy_.name
    for layer, score in fitted[0].layer_scores_.items():
        expected = (3 * score + 1) / 4  # the fourth is always right
        assert_allclose(fitted[1].layer_scores_[layer], expected)


def test_the_cost_is_that_of_the_passes(measured, make_transformer):
    advisor = StrategyAdvisor(make_transformer(), cv=2, random_state=0).fit(*measured)
    assert advisor.seconds_per_pass_ > 0
    many = recommend_strategy(5000, 1, "similar", targets="values")
    vars(advisor).update(strategy_=many, seconds_per_pass_=60.0)
    assert "about 31 forward passes over the data, 31 minutes" in advisor.report()
    vars(advisor).update(seconds_per_pass_=None)
    assert "about 31 forward passes over the data\n" in advisor.report()


def test_the_time_of_a_pass_is_that_of_one_view(
    measured, make_transformer, tmp_path, monkeypatch
):
    """A clock that advances by a second at each look: between two, all images run."""
    clock = SimpleNamespace(perf_counter=count().__next__)
    monkeypatch.setattr("skltl.strategy._comparison.time", clock)
    for n_views in (1, 10):
        advisor = StrategyAdvisor(make_transformer(n_views=n_views), cv=2)
        advisor.fit(*measured)
        assert_allclose(advisor.seconds_per_pass_, 1 / n_views)
    cached = StrategyAdvisor(make_transformer(cache=tmp_path), cv=2, random_state=0)
    assert cached.fit(*measured).seconds_per_pass_ is None


def test_several_backbones_are_compared_for_values(measured, make_transformer):
    advisor = StrategyAdvisor(
        make_transformer(pooling=2),
        backbones=[make_backbone("tiny"), make_backbone("other")],
        cv=3,
        random_state=0,
    )
    advisor.fit(*measured)
    alone = clone(advisor).set_params(backbones=None).fit(*measured)
    assert advisor.backbone_scores_["tiny"] == max(alone.layer_scores_.values())
    scores = advisor.backbone_scores_
    assert advisor.best_backbone_ == max(scores, key=scores.get)


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
    with pytest.raises(ValueError, match="has classes, not labels"):
        recommend_strategy(100, 3, "contained", targets="labels")
    with pytest.raises(ValueError, match="set task='regression'"):
        StrategyAdvisor(make_transformer()).fit(measured[0], [*np.arange(89) % 2, 7])
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
