"""Advice is measured, costs a pass, and is taken by ``TransferClassifier``."""

import pickle

import numpy as np
import pytest
import skops.io
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn
from torchvision.models import get_model

import skltl
from skltl import (
    Backbone,
    CNNFeatureTransformer,
    Preprocessing,
    PretrainedCNNClassifier,
    StrategyAdvisor,
    TransferClassifier,
)
from skltl.backbones import imagenet_names
from skltl.exceptions import EngineError

ROWS = {"image_shape": (8, 8), "image_size": 32, "random_state": 0}


@pytest.fixture(scope="module")
def digits():
    rows, labels = load_digits(return_X_y=True)
    return rows[1:101] / 16, labels[1:101]


@pytest.fixture
def crossed(monkeypatch):
    """Count the pictures that cross a network."""
    counts = []
    features = skltl.backbones.Runner.features

    def counted(self, pixels, *others):
        counts.append(int(pixels.flatten(1).any(dim=1).sum()))
        return features(self, pixels, *others)

    monkeypatch.setattr(skltl.backbones.Runner, "features", counted)
    return counts


def test_scores_by_layer_are_those_of_scikit_learn(digits):
    X, y = digits

    advisor = StrategyAdvisor("tiny", **ROWS).fit(X, y)

    folds = RepeatedStratifiedKFold(n_splits=5, n_repeats=3, random_state=0)
    probe = make_pipeline(StandardScaler(), LinearSVC(C=0.01))
    assert list(advisor.layer_scores_) == [
        "stem",
        "block1",
        "block2",
        "block3",
        "block4",
    ]
    for layer, score in advisor.layer_scores_.items():
        features = CNNFeatureTransformer("tiny", layer=layer, **ROWS).fit_transform(X)
        expected = cross_val_score(probe, features, y, cv=folds).mean()
        assert_allclose(score, expected, atol=0.011)
    best = max(advisor.layer_scores_.values())
    assert advisor.layer_scores_[advisor.best_layer_] == best


def test_digits_are_different_and_get_an_earlier_cut(digits):
    advisor = StrategyAdvisor("tiny", **ROWS).fit(*digits)

    assert advisor.similarity_ == "different"
    assert advisor.best_layer_ != "block4"
    assert advisor.strategy_.name == "extract_early"
    assert advisor.strategy_.estimator[0].layer == advisor.best_layer_
    assert (advisor.n_images_, advisor.n_classes_) == (100, 10)


def test_advice_costs_one_pass(digits, crossed):
    StrategyAdvisor("tiny", **ROWS).fit(*digits)

    assert sum(crossed) == 100


def test_no_more_pictures_are_looked_at_than_asked(digits, crossed):
    advisor = StrategyAdvisor("tiny", max_images=60, **ROWS).fit(*digits)

    assert sum(crossed) == advisor.n_looked_at_
    assert abs(advisor.n_looked_at_ - 60) <= 5  # of each class its share
    assert advisor.n_images_ == 100


@pytest.fixture(scope="module")
def known_pictures():
    """Pictures of noise, and what the network takes them for."""
    rng = np.random.default_rng(0)
    noise = rng.integers(256, size=(400, 80, 80, 3), dtype=np.uint8)
    means = np.linspace(0.2, 1, 400).reshape(-1, 1, 1, 1)
    tints = rng.uniform(0.2, 1, size=(400, 1, 1, 3))
    X = (noise * means * tints).astype(np.uint8)
    names = PretrainedCNNClassifier("tiny").fit(X).predict(X)
    frequent = [name for name in np.unique(names) if (names == name).sum() >= 12]
    chosen = np.isin(names, frequent)
    assert len(frequent) >= 2
    return X[chosen], names[chosen]


@pytest.mark.parametrize("are_numbers", [False, True], ids=["names", "wordnet"])
def test_classes_that_the_network_knows_are_noticed(are_numbers, known_pictures):
    X, y = known_pictures
    if are_numbers:
        numbers = {name: number for number, name in imagenet_names().items()}
        y = np.array([numbers[name] for name in y])

    fitted = TransferClassifier("tiny", random_state=0).fit(X[::2], y[::2])

    assert fitted.advisor_.as_is_score_ > 0.9
    assert fitted.advisor_.similarity_ == "contained"
    assert fitted.strategy_.name == "as_is"
    assert fitted.score(X[1::2], y[1::2]) > 0.95  # what was measured is what it is


def test_a_file_with_another_head_knows_no_categories(tmp_path):
    model = get_model("squeezenet1_1", weights=None, num_classes=7)
    path = tmp_path / "seven.safetensors"
    save_file(model.state_dict(), path)
    X = np.random.default_rng(0).integers(256, size=(8, 64, 64, 3), dtype=np.uint8)

    advisor = StrategyAdvisor("squeezenet1_1", weights=path, image_size=64, cv=2)
    advisor.fit(X, ["tabby", "beagle"] * 4)

    assert advisor.as_is_score_ is None
    assert advisor.similarity_ != "contained"


def test_rare_classes_keep_enough_pictures(digits, crossed):
    X, _ = digits
    y = np.array([0] * 90 + [1] * 5 + [2] * 5)

    advisor = StrategyAdvisor("tiny", max_images=30, **ROWS).fit(X, y)

    assert np.isfinite(list(advisor.layer_scores_.values())).all()
    assert sum(crossed) == advisor.n_looked_at_ <= 40


def test_a_refit_that_fails_leaves_the_advice_before(digits):
    X, y = digits
    advisor = StrategyAdvisor("tiny", **ROWS).fit(X, y)
    expected = advisor.report()

    with pytest.raises(ValueError, match="one class only|single picture"):
        advisor.fit(X[:5], [0, 0, 0, 0, 1])

    assert advisor.report() == expected


def test_networks_with_one_cut_have_no_earlier_one(digits):
    blocks = {"only": nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())}
    backbone = Backbone.from_blocks("one", blocks, preprocessing=Preprocessing(16))

    advisor = StrategyAdvisor(backbone, image_shape=(8, 8)).fit(*digits)

    assert advisor.lead_ == (0.0, 0.0)
    assert advisor.similarity_ == "similar"


def test_nothing_of_the_time_of_the_fit_is_left(digits):
    fitted = TransferClassifier("tiny", **ROWS).fit(*digits)

    for estimator in (
        fitted.advisor_,
        fitted.estimator_[0],
        fitted.strategy_.estimator[0],
        fitted.advisor_.strategy_.estimator[0],
    ):
        assert estimator.cache is None
    with pytest.raises(NotFittedError):
        fitted.strategy_.estimator.predict(digits[0])


def test_random_weights_are_the_same_for_measure_and_fit(digits, crossed):
    TransferClassifier("tiny", weights=None, image_shape=(8, 8), image_size=32).fit(
        *digits
    )

    assert sum(crossed) == 100


def test_a_layer_that_has_no_meaning_is_refused(digits):
    with pytest.raises(ValueError, match="no use to strategy='extract'"):
        TransferClassifier("tiny", strategy="extract", layer="block1", **ROWS).fit(
            *digits
        )


def test_what_runs_may_change_after_the_fit(digits):
    fitted = TransferClassifier("tiny", **ROWS).fit(*digits)

    with pytest.raises(ValueError, match="Unknown device 'nonsense'"):
        fitted.set_params(device="nonsense").predict(digits[0])

    step = fitted.set_params(device="cpu", engine="torch", decode="fast")
    step.predict(digits[0][:3])
    assert (step.estimator_[0].engine, step.estimator_[0].decode) == ("torch", "fast")


@pytest.mark.parametrize("kind", [StrategyAdvisor, TransferClassifier])
def test_engine_and_decoding_are_those_of_all_that_runs(kind, digits, monkeypatch):
    settings = {"engine": "torch", "decode": "fast"}
    fitted = kind("tiny", **settings, **ROWS).fit(*digits)

    advised = fitted.strategy_.estimator.get_params()
    assert {name: advised[f"feat__{name}"] for name in settings} == settings

    monkeypatch.setattr("skltl.backbones._engines.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="engine='openvino' cannot run"):
        kind("tiny", engine="openvino", **ROWS).fit(*digits)


def test_the_report_says_what_was_measured(digits):
    advisor = StrategyAdvisor("tiny", **ROWS).fit(*digits)

    report = advisor.report()

    assert "100 pictures of 10 classes" in report
    for layer, score in advisor.layer_scores_.items():
        assert f"{layer:<12} {score:.3f}" in report
    assert "Strategy: extract_early" in report
    assert "<pre>100 pictures" in advisor._repr_html_()
    assert "StrategyAdvisor" in StrategyAdvisor("tiny")._repr_mimebundle_()["text/html"]


def test_what_cannot_be_advised_on_is_refused(digits):
    X = digits[0]

    with pytest.raises(ValueError, match="one class only"):
        StrategyAdvisor("tiny", **ROWS).fit(X, np.zeros(100))
    with pytest.raises(ValueError, match="The class 7 has a single picture"):
        StrategyAdvisor("tiny", **ROWS).fit(X[:4], [5, 5, 5, 7])
    with pytest.raises(NotFittedError):
        StrategyAdvisor("tiny").report()


def test_the_classifier_is_what_was_advised(digits, crossed):
    X, y = digits

    fitted = TransferClassifier("tiny", **ROWS).fit(X, y)

    assert sum(crossed) == 100  # the features that were measured serve
    assert fitted.advisor_.strategy_.name == fitted.strategy_.name == "extract_early"
    expected = clone(fitted.advisor_.strategy_.estimator).fit(X, y)
    assert_allclose(
        fitted.decision_function(X), expected.decision_function(X), atol=0.05
    )
    assert fitted.estimator_[0].cache is None
    assert not hasattr(fitted, "predict_proba")  # a support vector machine has none


@pytest.mark.parametrize(
    "strategy",
    ["as_is", "extract", "extract_early", "finetune", "finetune_top", "scratch"],
)
def test_a_strategy_may_be_named(strategy, digits, monkeypatch):
    monkeypatch.setattr("skltl.strategy._recommendation.SCRATCH_EPOCHS", 1)
    X, y = digits[0][:40], np.array(list("abcd") * 10)

    fitted = TransferClassifier("tiny", strategy=strategy, **ROWS).fit(X, y)

    assert fitted.strategy_.name == strategy
    assert fitted.advisor_ is None
    assert set(fitted.predict(X)) <= set("abcd")
    assert_array_equal(fitted.classes_, list("abcd"))
    if strategy != "extract_early":
        assert_allclose(fitted.predict_proba(X).sum(axis=1), 1, rtol=1e-5)


def test_each_training_fold_is_advised_on_alone(digits, monkeypatch):
    X, y = digits
    seen = []
    fit = StrategyAdvisor.fit

    def noted(self, X, y):
        seen.append(len(X))
        return fit(self, X, y)

    monkeypatch.setattr(StrategyAdvisor, "fit", noted)

    scores = cross_val_score(TransferClassifier("tiny", **ROWS), X, y, cv=2)

    assert seen == [50, 50]
    assert scores.mean() > 0.5


@pytest.mark.parametrize("kind", ["pickle", "skops"])
def test_a_saved_classifier_is_the_same(kind, digits):
    X, y = digits
    fitted = TransferClassifier("tiny", **ROWS).fit(X, y)

    if kind == "pickle":
        loaded = pickle.loads(pickle.dumps(fitted))
    else:
        trusted = [*skltl.SKOPS_TRUSTED, "sklearn.svm._classes.LinearSVC"]
        loaded = skops.io.loads(skops.io.dumps(fitted), trusted=trusted)

    assert_array_equal(loaded.predict(X), fitted.predict(X))
    assert loaded.advisor_.report() == fitted.advisor_.report()
