"""``TransferClassifier``: repeatable, with weights and groups, and safe to keep."""

import io
import pickle
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import skops.io
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_digits

from skltl import (
    SKOPS_TRUSTED,
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    StrategyAdvisor,
    TransferClassifier,
    make_feature_pipeline,
)
from skltl.exceptions import ImageReadError

ROWS = {"image_shape": (8, 8), "image_size": 32, "random_state": 0}
STRATEGIES = ["as_is", "extract", "extract_early", "finetune", "finetune_top", "auto"]


@pytest.fixture(scope="module")
def digits():
    rows, labels = load_digits(return_X_y=True)
    return rows[1:61] / 16, labels[1:61] % 3


@pytest.mark.parametrize("strategy", [*STRATEGIES, "scratch"])
def test_a_seed_gives_the_same_bits(strategy, digits, monkeypatch):
    monkeypatch.setattr("skltl.strategy._rules.SCRATCH_EPOCHS", 1)
    X, y = digits
    found = []
    for seed in (0, 1):
        np.random.seed(seed)  # noqa: NPY002
        fitted = TransferClassifier("tiny", strategy=strategy, **ROWS).fit(X, y)
        found.append(fitted.decision_function(X))

    assert_array_equal(*found)


def test_a_generator_stands_for_the_seed_that_it_gives(digits):
    settings = {**ROWS, "strategy": "extract_early"}
    first, second = (
        TransferClassifier(
            "tiny", **{**settings, "random_state": np.random.RandomState(3)}
        ).fit(*digits)
        for _ in range(2)
    )

    assert_array_equal(*(one.decision_function(digits[0]) for one in (first, second)))


def test_advice_with_a_seed_is_the_same_twice(digits):
    found = []
    for seed in (0, 1):
        np.random.seed(seed)  # noqa: NPY002
        found.append(StrategyAdvisor("tiny", **ROWS).fit(*digits))

    first, second = found
    assert first.report() == second.report()
    for name in ("layer_scores_", "layer_errors_", "lead_", "size_scores_", "gain_"):
        assert getattr(first, name) == getattr(second, name)


@pytest.mark.parametrize("strategy", ["extract", "extract_early", "auto"])
def test_weights_reach_scaler_and_classifier(strategy, digits):
    X, y = digits
    weights = np.random.default_rng(0).uniform(0.1, 3, len(y))

    fitted = TransferClassifier("tiny", strategy=strategy, **ROWS)
    fitted.fit(X, y, sample_weight=weights)

    pipeline = clone(fitted.strategy_.estimator)
    (_, scaler), (_, last) = pipeline.steps[1:]
    features = pipeline[0].fit_transform(X)
    weights /= weights.mean()
    last.fit(scaler.fit_transform(features, sample_weight=weights), y, weights)
    expected = pipeline.decision_function(X)
    assert_allclose(fitted.decision_function(X), expected, rtol=1e-4, atol=1e-5)
    plain = clone(fitted).fit(X, y).decision_function(X)
    assert abs(plain - expected).max() > 0.01


def test_weights_are_taken_with_routed_metadata(digits):
    X, y = digits
    weights = np.linspace(0.1, 2, len(y))
    classifier = TransferClassifier("tiny", strategy="extract", **ROWS)
    expected = clone(classifier).fit(X, y, weights).decision_function(X)

    with config_context(enable_metadata_routing=True):
        found = clone(classifier).fit(X, y, weights).decision_function(X)

    assert_array_equal(found, expected)


def test_weights_and_groups_reach_the_tuned_network(digits):
    X, y = digits
    weights = np.linspace(0.1, 2, len(y))
    settings = {**ROWS, "strategy": "finetune_top", "layer": "block2"}

    fitted = TransferClassifier("tiny", **settings)
    fitted.fit(X, y, sample_weight=weights, groups=np.arange(len(y)) // 2)

    direct = FineTunedCNNClassifier("tiny", layer="block2", **ROWS)
    direct.fit(X, y, sample_weight=weights, groups=np.arange(len(y)) // 2)
    assert_array_equal(fitted.decision_function(X), direct.decision_function(X))


def test_images_of_weight_0_are_not_measured(digits):
    X, y = digits
    weights = np.ones(len(y))
    weights[::4] = 0
    some = weights > 0

    weighed = StrategyAdvisor("tiny", **ROWS).fit(X, y, weights)

    part = StrategyAdvisor("tiny", **ROWS).fit(X[some], y[some])
    assert weighed.report() == part.report()
    assert weighed.layer_scores_ == part.layer_scores_


def test_weights_weigh_the_accuracies(digits):
    """Of images that are all alike but for their labels, the heavier label is right."""
    y = np.array([0, 1] * 15)
    X = np.tile(digits[0][:1], (30, 1))

    heavy = StrategyAdvisor("tiny", **ROWS).fit(X, y, np.where(y == 0, 3.0, 1.0))

    assert_allclose(list(heavy.layer_scores_.values()), 0.75, atol=1e-9)


def test_groups_are_in_one_fold(digits):
    """Labels without sense are known only from a copy of the same image."""
    X = np.repeat(digits[0][:40], 2, axis=0)
    y = np.repeat(np.random.default_rng(0).integers(2, size=40), 2)
    groups = np.repeat(np.arange(40), 2)

    leaking = StrategyAdvisor("tiny", **ROWS).fit(X, y)
    honest = StrategyAdvisor("tiny", **ROWS).fit(X, y, groups=groups)

    assert max(leaking.layer_scores_.values()) > 0.9
    assert max(honest.layer_scores_.values()) < 0.75
    in_transfer = TransferClassifier("tiny", **ROWS).fit(X, y, groups=groups)
    assert in_transfer.advisor_.layer_scores_ == honest.layer_scores_


def test_groups_that_allow_no_folds_are_refused(digits):
    X, y = digits

    with pytest.raises(ValueError, match="class 0 has a single group of images"):
        StrategyAdvisor("tiny", **ROWS).fit(X, y, groups=y)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("wrong", ["y", "sample_weight", "groups"])
def test_lengths_are_compared_before_images_are_read(strategy, wrong):
    paths = [f"not_there_{number}.jpg" for number in range(6)]
    given = {"y": [0, 1] * 3, "sample_weight": [1.0] * 6, "groups": list(range(6))}
    given[wrong] = given[wrong][:5]

    with pytest.raises(ValueError, match="inconsistent numbers|sample_weight.shape"):
        TransferClassifier("tiny", strategy=strategy).fit(paths, **given)
    with pytest.raises(ValueError, match="inconsistent numbers|sample_weight.shape"):
        StrategyAdvisor("tiny").fit(paths, **given)


def test_threads_may_ask_a_classifier_that_was_set_anew(digits):
    X, y = digits
    fitted = TransferClassifier("tiny", strategy="extract", **ROWS).fit(X, y)
    expected = fitted.predict_proba(X)
    fitted.set_params(n_jobs=2, engine="torch")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fitted.predict_proba(X), range(8)))

    for one in found:
        assert_array_equal(one, expected)


def test_a_fit_needs_no_folder_that_can_be_written_to(digits, monkeypatch, tmp_path):
    """Features that were measured are handed on, not written down."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    with pytest.raises(FileNotFoundError):
        tempfile.mkdtemp()

    fitted = TransferClassifier("tiny", **ROWS).fit(*digits)

    assert_array_equal(fitted.predict(digits[0]), digits[1])


@pytest.mark.parametrize("max_images", [2000, 30])
def test_measured_features_are_as_good_as_new_ones(max_images, digits, monkeypatch):
    X, y = digits
    defaults = StrategyAdvisor.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "max_images", max_images)

    fitted = TransferClassifier("tiny", **ROWS).fit(X, y)

    assert fitted.advisor_.n_looked_at_ == min(max_images, len(y))
    expected = clone(fitted.strategy_.estimator).fit(X, y).decision_function(X)
    assert_allclose(fitted.decision_function(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_file_says_nothing_about_where_it_is_loaded(strategy, digits, tmp_path):
    X, y = digits
    folder = tmp_path / "cache"
    fitted = TransferClassifier("tiny", strategy=strategy, cache=folder, **ROWS)
    expected = fitted.fit(X, y).predict(X)
    file = io.BytesIO()
    joblib.dump(fitted.set_params(verbose=1), file)
    file.seek(0)
    shutil.rmtree(folder, ignore_errors=True)

    loaded = joblib.load(file)
    found = loaded.predict(X)
    clone(loaded.strategy_.estimator).fit(X, y)

    assert_array_equal(found, expected)
    assert (loaded.cache, loaded.verbose) == (None, 0)
    assert not folder.exists()
    if strategy == "auto":
        assert loaded.advisor_.cache is None
        clone(loaded.advisor_.strategy_.estimator).fit(X, y)
        assert not folder.exists()


@pytest.mark.parametrize("kind", [StrategyAdvisor, TransferClassifier])
def test_what_is_not_fitted_keeps_its_cache(kind):
    """The processes of a search get it by a pickle."""
    copied = pickle.loads(pickle.dumps(kind("tiny", cache="folder", verbose=1)))

    assert (copied.cache, copied.verbose) == ("folder", 1)


def test_pandas_output_is_understood(digits):
    X, y = digits

    with config_context(transform_output="pandas"):
        fitted = TransferClassifier("tiny", **ROWS).fit(X, y)
        found = fitted.decision_function(X)

    expected = TransferClassifier("tiny", **ROWS).fit(X, y).decision_function(X)
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_code_of_a_strategy_makes_its_estimator():
    names = {
        "make_feature_pipeline": make_feature_pipeline,
        "FineTunedCNNClassifier": FineTunedCNNClassifier,
    }
    from skltl import PretrainedCNNClassifier, recommend_strategy

    names["PretrainedCNNClassifier"] = PretrainedCNNClassifier
    for size in (300, 5_000, 500_000):
        for similarity in ("contained", "similar", "different"):
            strategy = recommend_strategy(
                size, 3, similarity, backbone="tiny", **ROWS, n_jobs=2
            )

            made = eval(strategy.code, names)

            assert repr(made) == repr(strategy.estimator)


@pytest.mark.parametrize("strategy", ["extract", "extract_early", "finetune", "auto"])
def test_images_without_weight_are_as_good_as_left_out(strategy, digits):
    """All images of a class among them: liblinear would shift the other classes."""
    X, y = digits
    weights = (y != 0).astype(float)
    made = TransferClassifier("tiny", strategy=strategy, **ROWS)

    found = clone(made).fit(X, y, sample_weight=weights)

    expected = made.fit(X[y != 0], y[y != 0])
    assert found.classes_.tolist() == [1, 2]
    assert_allclose(
        found.decision_function(X), expected.decision_function(X), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("strategy", ["extract", "extract_early", "auto"])
def test_only_the_ratios_of_weights_count(strategy, digits):
    X, y = digits
    weights = np.random.default_rng(0).uniform(0.1, 3, len(y))
    given = weights.copy()
    one, other = (
        TransferClassifier("tiny", strategy=strategy, **ROWS).fit(
            X, y, factor * weights
        )
        for factor in (1, 1e-4)
    )

    assert_allclose(
        one.decision_function(X), other.decision_function(X), rtol=1e-4, atol=1e-5
    )
    if strategy == "auto":
        assert one.advisor_.layer_scores_ == pytest.approx(other.advisor_.layer_scores_)
    assert_array_equal(weights, given)


@pytest.mark.parametrize("strategy", ["extract", "finetune", "auto"])
def test_an_unreadable_image_is_named_by_its_place_among_all(strategy):
    images = [np.full((16, 16), 10 * number, np.uint8) for number in range(20)]
    images[17] = np.full((16, 16), np.nan)
    weights = np.r_[np.zeros(10), np.ones(10)]
    made = TransferClassifier("tiny", strategy=strategy, image_size=16, random_state=0)

    with pytest.raises(ImageReadError, match="Image 17 could not be read") as caught:
        made.fit(images, [0, 1] * 10, sample_weight=weights)

    assert caught.value.index == 17


def test_an_unreadable_image_that_is_not_evaluated_is_named(monkeypatch):
    defaults = StrategyAdvisor.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "max_images", 30)
    images = [np.full((16, 16), number, np.uint8) for number in range(60)]
    made = TransferClassifier("tiny", image_size=16, random_state=0)
    for number in range(5, 60, 13):
        spoiled = [*images]
        spoiled[number] = np.full((16, 16), np.nan)

        with pytest.raises(ImageReadError, match=f"Image {number} could not"):
            made.fit(spoiled, [0, 1] * 30)


def planted(fitted, folder):
    """Put a folder where a file of a fitted estimator has none; `fitted` is changed."""
    state = fitted.__getstate__()
    for part in (state, state.get("_set_at_fit", {})):
        if "cache" in part:
            part |= {"cache": str(folder), "verbose": 1}
    type(fitted).__getstate__, before = lambda self: state, type(fitted).__getstate__
    return before


def pickle_with(fitted, folder):
    kind, before = type(fitted), planted(fitted, folder)
    content = pickle.dumps(fitted)
    kind.__getstate__ = before
    return pickle.loads(content)


def skops_with(fitted, folder):
    kind, before = type(fitted), planted(fitted, folder)
    content = skops.io.dumps(fitted)
    kind.__getstate__ = before
    return skops.io.loads(content, trusted=SKOPS_TRUSTED)


@pytest.mark.parametrize("save", [pickle_with, skops_with], ids=["pickle", "skops"])
@pytest.mark.parametrize("kind", ["transformer", "classifier"])
def test_a_file_made_to_write_features_somewhere_does_not(kind, save, digits, tmp_path):
    X, y = digits
    made = (
        CNNFeatureTransformer("tiny", **ROWS)
        if kind == "transformer"
        else TransferClassifier("tiny", strategy="extract", **ROWS)
    ).fit(X, y)

    loaded = save(made, tmp_path / "planted")

    assert (loaded.cache, loaded.verbose) == (None, 0)
    getattr(loaded, "predict" if kind == "classifier" else "transform")(X)
    assert not (tmp_path / "planted").exists()
