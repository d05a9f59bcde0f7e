"""Advice is measured, costs a pass, and is taken by ``TransferClassifier``."""

import copy
import pickle

import numpy as np
import pytest
import skops.io
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.torch import save_file
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import (
    RepeatedStratifiedKFold,
    StratifiedKFold,
    cross_val_score,
    cross_validate,
    train_test_split,
)
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
    recommend_strategy,
)
from skltl._sklearn import InvalidParameterError
from skltl.exceptions import EngineError
from skltl.networks import imagenet_names

ROWS = {"image_shape": (8, 8), "image_size": 32, "random_state": 0}


@pytest.fixture(scope="module")
def digits():
    rows, labels = load_digits(return_X_y=True)
    return rows[1:101] / 16, labels[1:101]


@pytest.fixture
def crossed(monkeypatch):
    """Count the images that cross a network."""
    counts = []
    features = skltl.inference.Runner.features

    def counted(self, pixels, *others):
        counts.append(int(pixels.flatten(1).any(dim=1).sum()))
        return features(self, pixels, *others)

    monkeypatch.setattr(skltl.inference.Runner, "features", counted)
    return counts


def test_scores_by_layer_are_those_of_scikit_learn(digits):
    X, y = digits

    advisor = StrategyAdvisor("tiny", **ROWS).fit(X, y)

    folds = RepeatedStratifiedKFold(n_splits=5, n_repeats=3, random_state=0)
    probe = make_pipeline(StandardScaler(), LinearSVC(C=0.01, random_state=0))
    assert list(advisor.layer_scores_) == [
        "stem",
        "block1",
        "block2",
        "block3",
        "block4",
    ]
    for layer, score in advisor.layer_scores_.items():
        features = CNNFeatureTransformer("tiny", layer=layer, **ROWS).fit_transform(X)
        scores = cross_val_score(probe, features, y, cv=folds)
        assert_allclose(score, scores.mean(), rtol=1e-12)
        # Nadeau and Bengio: the 15 folds share training images.
        variance = ((scores - scores.mean()) ** 2).sum() / 14
        error = (variance * (1 / 15 + 20 / 80)) ** 0.5
        assert_allclose(advisor.layer_errors_[layer], error, rtol=1e-9)
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


def test_no_more_images_are_looked_at_than_asked(digits, crossed):
    advisor = StrategyAdvisor("tiny", max_images=60, **ROWS).fit(*digits)

    assert sum(crossed) == advisor.n_looked_at_
    assert abs(advisor.n_looked_at_ - 60) <= 5  # of each class its share
    assert advisor.n_images_ == 100


@pytest.fixture(scope="module")
def known_images():
    """Images of noise, and what the network takes them for."""
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
def test_classes_that_the_network_knows_are_noticed(are_numbers, known_images):
    X, y = known_images
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


def test_rare_classes_keep_enough_images(digits, crossed):
    X, _ = digits
    y = np.array([0] * 90 + [1] * 5 + [2] * 5)

    advisor = StrategyAdvisor("tiny", max_images=30, **ROWS).fit(X, y)

    assert np.isfinite(list(advisor.layer_scores_.values())).all()
    assert sum(crossed) == advisor.n_looked_at_ <= 40


def test_a_refit_that_fails_leaves_the_advice_before(digits):
    X, y = digits
    advisor = StrategyAdvisor("tiny", **ROWS).fit(X, y)
    expected = advisor.report()

    with pytest.raises(ValueError, match="one class only|single image"):
        advisor.fit(X[:5], [0, 0, 0, 0, 1])

    assert advisor.report() == expected


def test_networks_with_one_cut_have_no_earlier_one(digits):
    blocks = {"only": nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())}
    backbone = Backbone.from_blocks("one", blocks, preprocessing=Preprocessing(16))

    advisor = StrategyAdvisor(backbone, image_shape=(8, 8)).fit(*digits)

    assert advisor.lead_ == (0.0, 0.0)
    assert advisor.similarity_ == "similar"
    assert "earlier layer" not in advisor.report()
    assert "cannot be measured" in advisor.report()


@pytest.mark.parametrize("ending", ["adaptive pooling", "one size only"])
def test_feature_maps_are_known_by_their_shape(ending, digits):
    """Behind adaptive pooling, or for one size of images only, there is no stride."""
    blocks = {
        "stem": nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()),
        "top": nn.Sequential(nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)),
    }
    if ending == "one size only":
        blocks["top"] = nn.Sequential(
            nn.Flatten(), nn.Linear(8 * 7 * 7, 18), nn.Unflatten(1, (2, 3, 3))
        )
    backbone = Backbone.from_blocks("own", blocks, preprocessing=Preprocessing(16))

    advisor = StrategyAdvisor(backbone, image_shape=(8, 8), random_state=0).fit(*digits)

    assert list(advisor.layer_scores_) == ["stem", "top"]
    early = recommend_strategy(300, 5, "different", backbone=backbone)
    assert early.estimator[0].layer == "top"  # two thirds of two


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

    with pytest.raises(InvalidParameterError, match="'precision' parameter"):
        fitted.set_params(device="cpu", precision="nonsense").predict(digits[0])
    fitted.set_params(precision="float32", engine="torch", decode="fast", verbose=0)
    expected = pickle.loads(pickle.dumps(fitted.estimator_)).set_params(
        feat__precision="float32", feat__engine="torch", feat__decode="fast"
    )
    assert_array_equal(
        fitted.decision_function(digits[0][:3]),
        expected.decision_function(digits[0][:3]),
    )


@pytest.mark.parametrize("strategy", ["extract_early", "as_is", "finetune_top"])
def test_predictions_leave_the_fitted_estimator_alone(strategy, digits, monkeypatch):
    X, y = digits[0][:20], digits[1][:20]
    fitted = TransferClassifier("tiny", strategy=strategy, **ROWS).fit(X, y)
    inner = fitted.estimator_
    reader = inner[0] if strategy == "extract_early" else inner
    reader.set_params(n_jobs=1)  # by the user
    before = {**inner.get_params()}
    seen = []
    predict = type(inner).predict

    def noted(self, X):
        seen.append(self if reader is inner else self[0])
        return predict(self, X)

    monkeypatch.setattr(type(inner), "predict", noted)

    fitted.predict(X)
    fitted.set_params(decode="fast", engine="torch").predict(X)

    assert inner.get_params() == before
    assert fitted.estimator_ is inner
    assert [(one.n_jobs, one.decode) for one in seen] == [(1, "exact"), (1, "fast")]


@pytest.mark.parametrize("kind", [StrategyAdvisor, TransferClassifier])
def test_engine_and_decoding_are_those_of_all_that_runs(kind, digits, monkeypatch):
    settings = {"engine": "torch", "decode": "fast"}
    fitted = kind("tiny", **settings, **ROWS).fit(*digits)

    advised = fitted.strategy_.estimator.get_params()
    assert {name: advised[f"feat__{name}"] for name in settings} == settings

    monkeypatch.setattr("skltl.inference._openvino.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="engine='openvino' cannot run"):
        kind("tiny", engine="openvino", **ROWS).fit(*digits)


def test_the_report_says_what_was_measured(digits):
    advisor = StrategyAdvisor("tiny", **ROWS).fit(*digits)

    report = advisor.report()

    smallest = np.bincount(digits[1]).min()
    assert f"100 images of 10 classes, {smallest} of the smallest" in report
    for layer, score in advisor.layer_scores_.items():
        assert f"{layer:<12} {score:.3f} ({advisor.layer_errors_[layer]:.3f})" in report
    for size, score in advisor.size_scores_.items():
        assert f"{size:<12} {score:.3f} ({advisor.size_errors_[size]:.3f})" in report
    assert "Strategy: extract_early" in report
    assert report.endswith(advisor.strategy_.code)
    assert max(map(len, report.splitlines()[:-1])) <= 80


def fitted_with(advisor, **attributes):
    """Return an advisor that has measured something else."""
    other = copy.copy(advisor)
    vars(other).update(attributes)
    return other


def test_more_images_pay_only_where_accuracy_can_rise(digits):
    advisor = StrategyAdvisor("tiny", **ROWS).fit(*digits)

    def outlook(scores, gain):
        sizes = dict(zip([20, 40, 80], scores, strict=True))
        said = fitted_with(
            advisor, size_scores_=sizes, size_errors_=dict.fromkeys(sizes, 0.01),
            gain_=gain,
        ).report()  # fmt: skip
        return [line.strip() for line in said.splitlines() if "more images" in line]

    assert outlook([0.6, 0.7, 0.8], (0.1, 0.02)) == ["more images would pay."]
    little = ["more images would change little."]
    assert outlook([0.7, 0.967, 1.0], (0.033, 0.01)) == little
    assert outlook([0.7, 0.967, 0.995], (0.028, 0.01)) == little
    assert outlook([0.7, 0.701, 0.702], (0.001, 0.01)) == little
    is_open = outlook([0.6, 0.7, 0.72], (0.02, 0.03))
    assert is_open == [
        "whether more images would pay is open, the gain is within its error."
    ]


def test_luck_is_named_where_it_decides(digits):
    advisor = StrategyAdvisor("tiny", **ROWS).fit(*digits)

    def says_luck(lead):
        return "luck may have decided" in fitted_with(advisor, lead_=lead).report()

    assert not says_luck((0.1, 0.03))
    assert says_luck((0.03, 0.03))
    assert says_luck((-0.01, 0.03))
    assert not says_luck((-0.05, 0.03))


def test_the_same_layer_has_one_accuracy(digits):
    X, y = digits
    known = (y < 3).nonzero()[0][:30]

    for rows in (slice(None), known):
        advisor = StrategyAdvisor("tiny", **ROWS).fit(X[rows], y[rows])

        used = advisor.strategy_.estimator[0].layer
        assert advisor.layer_ == ("block4" if used == "last" else used)
        size, score = list(advisor.size_scores_.items())[-1]
        assert score == advisor.layer_scores_[advisor.layer_]
        assert advisor.size_errors_[size] == advisor.layer_errors_[advisor.layer_]
        assert size == round(0.8 * len(y[rows]))


def test_scores_by_size_are_those_of_a_learning_curve(digits):
    """By hand: the training images of each fold are divided once more."""
    X, y = digits
    layer = StrategyAdvisor("tiny", **ROWS).fit(X, y).layer_
    features = CNNFeatureTransformer("tiny", layer=layer, **ROWS).fit_transform(X)
    probe = make_pipeline(StandardScaler(), LinearSVC(C=0.01, random_state=0))
    found, by_hand = [], []
    for seed in range(6):
        advisor = StrategyAdvisor("tiny", **{**ROWS, "random_state": seed}).fit(X, y)
        (before, low), (after, high) = list(advisor.size_scores_.items())[-2:]
        slope = (high - low) / np.log2(after / before)
        assert_allclose(advisor.gain_[0], slope, atol=1e-12)
        if advisor.layer_ == layer:
            found.append(list(advisor.size_scores_.values()))
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        for train, test in folds.split(X, y):
            for share in (0.25, 0.5):
                part, _ = train_test_split(
                    train, train_size=share, stratify=y[train], random_state=seed
                )
                fitted = probe.fit(features[part], y[part])
                by_hand.append(fitted.score(features[test], y[test]))

    assert_allclose(list(advisor.size_scores_), [20, 40, 80], atol=1)
    assert len(found) > 1
    by_hand = np.reshape(by_hand, (-1, 2))
    error = by_hand.std(axis=0) / np.sqrt(5 * len(found))
    difference = np.mean(found, axis=0)[:2] - by_hand.mean(axis=0)
    assert (np.abs(difference) < 3 * error).all()


def test_the_report_is_shown_under_scikit_learns_switch(digits):
    fitted = StrategyAdvisor("tiny", **ROWS).fit(*digits)
    unfitted = StrategyAdvisor("tiny")

    assert fitted._repr_html_().startswith("<pre>100 images of 10 classes")
    assert "<pre>100 images" in fitted._repr_mimebundle_()["text/html"]
    assert "StrategyAdvisor" in unfitted._repr_html_()
    assert "StrategyAdvisor" in unfitted._repr_mimebundle_()["text/html"]
    with config_context(display="text"):
        for advisor in (fitted, unfitted):
            assert not hasattr(advisor, "_repr_html_")
            assert advisor._repr_mimebundle_() == {"text/plain": repr(advisor)}


def test_what_cannot_be_advised_on_is_refused(digits):
    X = digits[0]

    with pytest.raises(ValueError, match="one class only"):
        StrategyAdvisor("tiny", **ROWS).fit(X, np.zeros(100))
    with pytest.raises(ValueError, match="The class 7 has a single image"):
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
        fitted.decision_function(X), expected.decision_function(X), atol=1e-5
    )
    assert fitted.estimator_[0].cache is None
    assert not hasattr(fitted, "predict_proba")  # a support vector machine has none


@pytest.mark.parametrize(
    "strategy",
    ["as_is", "extract", "extract_early", "finetune", "finetune_top", "scratch"],
)
def test_a_strategy_may_be_named(strategy, digits, monkeypatch):
    monkeypatch.setattr("skltl.strategy._rules.SCRATCH_EPOCHS", 1)
    X, y = digits[0][:40], np.array(list("abcd") * 10)

    fitted = TransferClassifier("tiny", strategy=strategy, **ROWS).fit(X, y)

    assert fitted.strategy_.name == strategy
    assert fitted.advisor_ is None
    assert set(fitted.predict(X)) <= set("abcd")
    assert_array_equal(fitted.classes_, list("abcd"))
    if strategy != "extract_early":
        assert_allclose(fitted.predict_proba(X).sum(axis=1), 1, rtol=1e-5)


def test_each_training_fold_is_advised_on_alone(digits):
    X, y = digits

    results = cross_validate(
        TransferClassifier("tiny", **ROWS), X, y, cv=2, return_estimator=True
    )

    assert [one.advisor_.n_images_ for one in results["estimator"]] == [50, 50]
    assert results["test_score"].mean() > 0.5


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
