"""``TransferClassifier``: its estimator, metadata, runtime parameters and files."""

import io
import pickle
import shutil
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import skops.io
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import config_context
from sklearn.base import clone
from sklearn.exceptions import DataConversionWarning
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    StratifiedKFold,
    cross_validate,
)

from skltl import (
    SKOPS_TRUSTED,
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    GradCAMDisplay,
    PredictionGridDisplay,
    StrategyAdvisor,
    TransferClassifier,
)
from skltl._sklearn import InvalidParameterError
from skltl.exceptions import EngineError, ImageReadError, UnknownLayerError

STRATEGIES = ["as_is", "extract", "extract_early", "finetune", "finetune_top", "auto"]


@pytest.fixture(scope="module", autouse=True)
def cross_validate_once():
    """Save time: no promise of this file is about repetitions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skltl.strategy._cross_validation.N_REPEATS", 1)
        yield


@pytest.fixture(scope="module")
def make_classifier(make_transformer):
    """Function that returns a small classifier of rows."""

    def make(strategy="auto", random_state=0, cv=2, **parameters):
        transformer = make_transformer(**parameters)
        return TransferClassifier(
            transformer, strategy=strategy, cv=cv, random_state=random_state
        )

    return make


@pytest.fixture(scope="module")
def fewer_digits(few_digits):
    """24 digits with words as labels."""
    X, y = few_digits
    return X[:24], np.array(["no", "one", "two"])[y[:24]]


@pytest.fixture(scope="module")
def fitted(fewer_digits, make_classifier, tmp_path_factory):
    """A fitted classifier for each strategy, with a cache; tests do not change them."""
    folder = tmp_path_factory.mktemp("cache") / "features"
    return {
        strategy: make_classifier(strategy, cache=folder).fit(*fewer_digits)
        for strategy in STRATEGIES
    }


def test_the_recommended_estimator_is_fitted(few_digits, make_classifier, n_forward):
    X, y = few_digits

    classifier = make_classifier().fit(X, y)

    assert sum(n_forward) == 60  # the evaluated features are reused
    assert classifier.advisor_.strategy_ is classifier.strategy_
    assert classifier.strategy_.name == "extract_early"
    assert not hasattr(classifier.advisor_, "transformer_")
    expected = clone(classifier.strategy_.estimator).fit(X, y)
    assert_allclose(
        classifier.decision_function(X), expected.decision_function(X), atol=1e-5
    )
    assert not hasattr(classifier, "predict_proba")  # a support vector machine has none
    assert classifier.n_features_in_ == 64


@pytest.mark.parametrize("strategy", STRATEGIES[:-1])
def test_a_given_strategy_is_fitted(strategy, fitted, fewer_digits):
    X, _ = fewer_digits
    classifier = fitted[strategy]

    assert classifier.strategy_.name == strategy
    assert classifier.advisor_ is None
    assert classifier.classes_.tolist() == ["no", "one", "two"]
    scores = classifier.decision_function(X)
    assert_array_equal(
        classifier.predict(X), classifier.classes_[scores.argmax(axis=1)]
    )
    if strategy != "extract_early":
        assert_allclose(classifier.predict_proba(X).sum(axis=1), 1, rtol=1e-5)


def test_training_from_scratch_uses_random_weights(
    fewer_digits, make_classifier, monkeypatch
):
    monkeypatch.setattr("skltl.strategy._rules.SCRATCH_EPOCHS", 1)
    X, y = fewer_digits

    scores = [
        make_classifier("scratch", random_state=seed).fit(X, y).decision_function(X)
        for seed in (0, 0, 1)
    ]

    assert_array_equal(scores[0], scores[1])
    assert (scores[0] != scores[2]).any()


@pytest.mark.parametrize("strategy", ["as_is", "extract", "finetune_top", "auto"])
def test_a_seed_gives_the_same_bits(strategy, fitted, fewer_digits):
    X, y = fewer_digits
    np.random.seed(1)  # noqa: NPY002

    again = clone(fitted[strategy]).fit(X, y)

    expected = fitted[strategy].decision_function(X)
    assert_array_equal(again.decision_function(X), expected)


def test_a_generator_stands_for_its_next_seed(fewer_digits, make_classifier):
    X, y = fewer_digits
    scores = []
    for _ in range(2):
        generator = np.random.RandomState(3)
        classifier = make_classifier("extract_early", random_state=generator)
        scores.append(classifier.fit(X, y).decision_function(X))

    assert_array_equal(*scores)


def test_random_weights_are_evaluated_and_fitted(few_digits, n_forward):
    transformer = CNNFeatureTransformer(
        "tiny", weights=None, image_shape=(8, 8), image_size=32
    )

    TransferClassifier(transformer, cv=2).fit(*few_digits)

    assert sum(n_forward) == 60


def test_unused_and_unknown_layers_are_refused(fewer_digits, make_classifier):
    with pytest.raises(ValueError, match="not used by strategy='extract'"):
        make_classifier("extract", layer="block1").fit(*fewer_digits)
    for strategy in ("auto", "finetune_top"):
        with pytest.raises(UnknownLayerError, match="block9"):
            make_classifier(strategy, layer="block9").fit(*fewer_digits)


def test_a_layer_of_the_transformer_is_used(few_digits, make_classifier):
    classifier = make_classifier(layer="stem").fit(*few_digits)

    assert classifier.strategy_.name == "extract_early"
    assert classifier.estimator_[0].layer == "stem"


def test_each_training_fold_is_evaluated_alone(few_digits, make_classifier):
    results = cross_validate(
        make_classifier(), *few_digits, cv=2, return_estimator=True
    )

    sizes = [fitted.advisor_.n_images_ for fitted in results["estimator"]]
    assert sizes == [30, 30]


@pytest.mark.parametrize("max_images", [2000, 30])
def test_evaluated_features_are_those_of_the_transformer(
    max_images, few_digits, make_classifier, monkeypatch
):
    X, y = few_digits
    defaults = StrategyAdvisor.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "max_images", max_images)

    classifier = make_classifier().fit(X, y)

    assert classifier.advisor_.n_evaluated_ == min(max_images, len(y))
    expected = clone(classifier.strategy_.estimator).fit(X, y).decision_function(X)
    assert_allclose(classifier.decision_function(X), expected, rtol=1e-4, atol=1e-5)


def test_no_temporary_folder_is_needed(
    fewer_digits, make_classifier, monkeypatch, tmp_path
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    with pytest.raises(FileNotFoundError):
        tempfile.mkdtemp()

    classifier = make_classifier().fit(*fewer_digits)

    assert classifier.score(*fewer_digits) == 1


@pytest.mark.parametrize("scope", ["global", "transformer"])
def test_pandas_output_changes_no_prediction(scope, fewer_digits, make_classifier):
    X, y = fewer_digits
    classifier = make_classifier()
    expected = clone(classifier).fit(X, y).decision_function(X)
    if scope == "transformer":
        classifier.transformer.set_output(transform="pandas")

    with config_context(transform_output="pandas" if scope == "global" else "default"):
        found = classifier.fit(X, y).decision_function(X)

    assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# Sample weights and groups


@pytest.mark.parametrize("strategy", ["extract", "auto"])
def test_weights_reach_scaler_and_classifier(strategy, few_digits, make_classifier):
    X, y = few_digits
    weights = np.random.default_rng(0).uniform(0.1, 3, len(y))
    classifier = make_classifier(strategy)
    plain = clone(classifier).fit(X, y).decision_function(X)

    classifier.fit(X, y, sample_weight=weights)

    pipeline = clone(classifier.strategy_.estimator)
    (_, scaler), (_, last) = pipeline.steps[1:]
    features = pipeline[0].fit_transform(X)
    weights /= weights.mean()
    last.fit(scaler.fit_transform(features, sample_weight=weights), y, weights)
    expected = pipeline.decision_function(X)
    assert_allclose(classifier.decision_function(X), expected, rtol=1e-4, atol=1e-5)
    assert abs(plain - expected).max() > 0.01


def test_weights_and_groups_reach_the_fine_tuned_network(
    fewer_digits, make_classifier, monkeypatch
):
    """With a validation set, groups matter, too."""
    X, y = fewer_digits
    metadata = {
        "sample_weight": np.linspace(0.1, 2, len(y)),
        "groups": np.arange(len(y)) // 2,
    }
    defaults = FineTunedCNNClassifier.__init__.__kwdefaults__
    for name, value in {"validation_fraction": 0.3, "head_epochs": 3}.items():
        monkeypatch.setitem(defaults, name, value)

    classifier = make_classifier("finetune_top", layer="block2")
    classifier.fit(X, y, **metadata)

    shared = {"image_shape": (8, 8), "image_size": 32, "random_state": 0}
    direct = FineTunedCNNClassifier("tiny", layer="block2", **shared)
    expected = clone(direct).fit(X, y, **metadata).decision_function(X)
    assert_array_equal(classifier.decision_function(X), expected)
    without_groups = direct.fit(X, y, metadata["sample_weight"]).decision_function(X)
    assert (without_groups != expected).any()


def test_groups_are_in_one_fold_of_the_evaluation(few_digits, make_classifier):
    X, y = few_digits
    groups = np.arange(len(y)) // 2
    classifier = make_classifier().fit(X, y, groups=groups)

    advisor = StrategyAdvisor(classifier.transformer, cv=2, random_state=0)
    advisor.fit(X, y, groups=groups)
    assert classifier.advisor_.layer_scores_ == advisor.layer_scores_
    without_groups = advisor.fit(X, y).layer_scores_
    assert classifier.advisor_.layer_scores_ != without_groups


@pytest.mark.parametrize("strategy", ["extract_early", "auto"])
def test_weight_0_is_leaving_out(strategy, few_digits, make_classifier):
    """All images of a class among them: liblinear would shift the other classes."""
    X, y = few_digits[0][:30], few_digits[1][:30]
    weights = (y != 0).astype(float)
    classifier = make_classifier(strategy)

    found = clone(classifier).fit(X, y, sample_weight=weights)

    expected = classifier.fit(X[y != 0], y[y != 0])
    assert found.classes_.tolist() == [1, 2]
    assert_allclose(
        found.decision_function(X), expected.decision_function(X), rtol=1e-4, atol=1e-5
    )


def test_only_the_ratios_of_weights_matter(few_digits, make_classifier):
    X, y = few_digits
    weights = np.random.default_rng(0).uniform(0.1, 3, len(y))
    given = weights.copy()

    large, small = (
        make_classifier().fit(X, y, factor * weights) for factor in (1, 1e-4)
    )

    assert_allclose(
        large.decision_function(X), small.decision_function(X), rtol=1e-4, atol=1e-5
    )
    assert large.advisor_.layer_scores_ == pytest.approx(small.advisor_.layer_scores_)
    assert_array_equal(weights, given)


@pytest.mark.parametrize("strategy", ["finetune", "auto"])
@pytest.mark.parametrize("wrong", ["y", "sample_weight", "groups"])
def test_lengths_are_compared_before_images_are_read(strategy, wrong):
    paths = [f"not_there_{number}.jpg" for number in range(6)]
    given = {"y": [0, 1] * 3, "sample_weight": [1.0] * 6, "groups": list(range(6))}
    given[wrong] = given[wrong][:5]
    transformer = CNNFeatureTransformer("tiny")

    with pytest.raises(ValueError, match="inconsistent numbers|sample_weight.shape"):
        TransferClassifier(transformer, strategy=strategy).fit(paths, **given)
    with pytest.raises(ValueError, match="inconsistent numbers|sample_weight.shape"):
        StrategyAdvisor(transformer).fit(paths, **given)


@pytest.mark.parametrize("strategy", ["extract", "auto"])
def test_metadata_are_accepted_with_and_without_routing(
    strategy, few_digits, make_classifier
):
    X, y = few_digits
    metadata = {"sample_weight": np.linspace(0.1, 2, 60), "groups": np.arange(60) // 2}
    classifier = make_classifier(strategy)
    expected = clone(classifier).fit(X, y, **metadata).decision_function(X)

    with config_context(enable_metadata_routing=True):
        found = clone(classifier).fit(X, y, **metadata).decision_function(X)

    assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", [StrategyAdvisor, TransferClassifier])
def test_metadata_can_be_requested(kind):
    with config_context(enable_metadata_routing=True):
        estimator = kind(CNNFeatureTransformer("tiny"))
        estimator.set_fit_request(sample_weight=True, groups=False)
        requests = clone(estimator).get_metadata_routing().fit.requests

    assert requests == {"sample_weight": True, "groups": False}


def test_metadata_are_routed_by_cross_validation(few_digits, make_classifier):
    X, y = few_digits
    weights, groups = np.linspace(0.1, 2, 60), np.arange(60) // 2
    classifier, folds = make_classifier(), GroupKFold(2)

    with config_context(enable_metadata_routing=True):
        classifiers = cross_validate(
            clone(classifier)
            .set_fit_request(sample_weight=True, groups=True)
            .set_score_request(sample_weight=False),
            *(X, y),
            cv=folds,
            params={"sample_weight": weights, "groups": groups},
            return_estimator=True,
        )["estimator"]

    for fitted, (train, _) in zip(classifiers, folds.split(X, y, groups), strict=True):
        metadata = {"sample_weight": weights[train], "groups": groups[train]}
        expected = clone(classifier).fit(X[train], y[train], **metadata)
        assert fitted.advisor_.report() == expected.advisor_.report()
        assert_array_equal(fitted.decision_function(X), expected.decision_function(X))


def test_metadata_are_routed_by_a_search(few_digits, make_classifier):
    X, y = few_digits
    weights = np.linspace(0.1, 2, 60)
    classifier = make_classifier("extract_early")
    layers = ["block1", "block3"]

    with config_context(enable_metadata_routing=True):
        search = GridSearchCV(
            clone(classifier)
            .set_fit_request(sample_weight=True, groups=False)
            .set_score_request(sample_weight=False),
            {"transformer__layer": layers},
            cv=StratifiedKFold(2),
        ).fit(X, y, sample_weight=weights)

    best = search.best_params_["transformer__layer"]
    assert search.cv_results_["param_transformer__layer"].tolist() == layers
    expected = classifier.set_params(transformer__layer=best).fit(X, y, weights)
    assert_array_equal(search.decision_function(X), expected.decision_function(X))


def test_a_column_of_labels_gives_one_warning(make_classifier, fewer_digits):
    X, y = fewer_digits

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        make_classifier().fit(X, np.reshape(y, (-1, 1)))

    assert [one.category for one in record] == [DataConversionWarning]
    assert record[0].filename == __file__


# Images that cannot be read


@pytest.mark.parametrize("strategy", ["extract", "finetune", "auto"])
def test_an_unreadable_image_is_named_by_its_original_position(strategy):
    images = [np.full((16, 16), 10 * number, np.uint8) for number in range(20)]
    images[17] = np.full((16, 16), np.nan)
    weights = np.r_[np.zeros(10), np.ones(10)]
    transformer = CNNFeatureTransformer("tiny", image_size=16)
    classifier = TransferClassifier(transformer, strategy=strategy, random_state=0)

    with pytest.raises(ImageReadError, match="Image 17 could not be read") as caught:
        classifier.fit(images, [0, 1] * 10, sample_weight=weights)

    assert caught.value.index == 17


def test_an_image_whose_features_overflow_is_named_by_its_original_position():
    images = [np.full((16, 16), number / 20, np.float32) for number in range(20)]
    images[17] *= np.float32(1e38)
    weights = np.r_[np.zeros(10), np.ones(10)]
    transformer = CNNFeatureTransformer("tiny", image_size=16, precision="float32")
    classifier = TransferClassifier(transformer, strategy="extract", random_state=0)

    with pytest.raises(ValueError, match="features of image 17 are NaN or infinite"):
        classifier.fit(images, [0, 1] * 10, sample_weight=weights)


@pytest.mark.parametrize(
    ("strategy", "on_error", "message"),
    [
        ("auto", "raise", "could not be read"),
        ("auto", "nan", "could not be read, and has no features"),
        ("extract", "nan", "could not be read, and has no features"),
    ],
)
def test_an_unreadable_image_is_named_whether_it_is_evaluated_or_not(
    strategy, on_error, message, monkeypatch
):
    defaults = StrategyAdvisor.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "max_images", 10)
    transformer = CNNFeatureTransformer("tiny", image_size=16, on_error=on_error)
    classifier = TransferClassifier(
        transformer, strategy=strategy, cv=2, random_state=0
    )
    images = [np.full((16, 16), number, np.uint8) for number in range(20)]
    for number in range(0, 20, 4):
        spoiled = [*images]
        spoiled[number] = np.full((16, 16), np.nan)

        with pytest.raises(ValueError, match=f"Image {number} {message}") as caught:
            classifier.fit(spoiled, [0, 1] * 10)
        assert isinstance(caught.value, ImageReadError) == (on_error == "raise")


# Parameters that are set after the fit


def test_runtime_parameters_take_effect_after_a_check(fitted, fewer_digits):
    X, _ = fewer_digits
    classifier = pickle.loads(pickle.dumps(fitted["extract_early"]))

    with pytest.raises(ValueError, match="Unknown device 'nonsense'"):
        classifier.set_params(transformer__device="nonsense").predict(X)
    classifier.set_params(transformer__device="cpu")
    with pytest.raises(InvalidParameterError, match="'precision' parameter"):
        classifier.set_params(transformer__precision="nonsense").predict(X)
    settings = {"precision": "float32", "engine": "torch", "decode": "fast"}
    classifier.set_params(
        **{f"transformer__{name}": settings[name] for name in settings}
    )

    expected = pickle.loads(pickle.dumps(classifier.estimator_))
    expected.set_params(**{f"feat__{name}": settings[name] for name in settings})
    found = classifier.decision_function(X)
    assert_array_equal(found, expected.decision_function(X))


@pytest.mark.parametrize("strategy", ["extract", "finetune"])
def test_displays_show_the_predictions_after_parameters_were_set(
    strategy, fitted, fewer_digits
):
    X, y = fewer_digits
    classifier = pickle.loads(pickle.dumps(fitted[strategy]))
    classifier.set_params(transformer__value_range=(0, 2))
    expected = classifier.predict_proba(X)

    display = PredictionGridDisplay.from_estimator(classifier, X, y, n_images=1)
    maps = GradCAMDisplay.from_estimator(classifier, X[:4])

    of_true = expected[y[:, None] == classifier.classes_]
    expected[y[:, None] == classifier.classes_] = -1
    assert_allclose(display.margins, (of_true - expected.max(axis=1)).min())
    assert_allclose(maps.proba, classifier.predict_proba(X[:4]).max(axis=1))


def test_other_parameters_take_effect_in_the_next_fit(fitted, fewer_digits):
    X, y = fewer_digits
    classifier = pickle.loads(pickle.dumps(fitted["extract_early"]))
    expected = classifier.decision_function(X)

    classifier.set_params(transformer__layer="stem", strategy="extract_early", cv=3)

    assert_array_equal(classifier.decision_function(X), expected)
    assert (classifier.fit(X, y).decision_function(X) != expected).any()


@pytest.mark.parametrize("strategy", ["extract_early", "as_is", "finetune_top"])
def test_predictions_do_not_change_the_fitted_estimator(
    strategy, fitted, fewer_digits, monkeypatch
):
    X, _ = fewer_digits
    classifier = pickle.loads(pickle.dumps(fitted[strategy]))
    inner = classifier.estimator_
    reader = inner[0] if strategy == "extract_early" else inner
    reader.set_params(n_jobs=1)  # by the user
    before = {**inner.get_params()}
    used = []
    predict = type(inner).predict

    def noted(self, X):
        used.append(self if reader is inner else self[0])
        return predict(self, X)

    monkeypatch.setattr(type(inner), "predict", noted)

    classifier.predict(X)
    classifier.set_params(transformer__decode="fast", transformer__engine="torch")
    classifier.predict(X)

    assert inner.get_params() == before
    assert classifier.estimator_ is inner
    assert [(reader.n_jobs, reader.decode) for reader in used] == [
        (1, "exact"),
        (1, "fast"),
    ]


def test_threads_predict_after_parameters_were_set(fitted, fewer_digits):
    X, _ = fewer_digits
    classifier = pickle.loads(pickle.dumps(fitted["extract"]))
    alone = pickle.loads(pickle.dumps(fitted["extract"]))
    settings = {"transformer__n_jobs": 2, "transformer__engine": "torch"}
    expected = alone.set_params(**settings).predict_proba(X)
    classifier.set_params(**settings)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: classifier.predict_proba(X), range(8)))

    for proba in found:
        assert_array_equal(proba, expected)


def test_an_engine_that_is_not_installed_is_refused(
    fewer_digits, make_classifier, monkeypatch
):
    monkeypatch.setattr("skltl.inference._openvino.find_spec", lambda name: None)

    with pytest.raises(EngineError, match="engine='openvino' cannot run"):
        make_classifier("extract", engine="openvino").fit(*fewer_digits)


# Saved files


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_saved_classifier_predicts_the_same_and_writes_nowhere(
    strategy, fitted, fewer_digits
):
    X, y = fewer_digits
    classifier = fitted[strategy]
    folder = classifier.transformer.cache
    classifier.set_params(verbose=1)
    expected = pickle.dumps(classifier)
    assert str(folder).encode() not in expected
    shutil.rmtree(folder, ignore_errors=True)

    loaded = pickle.loads(expected)
    classifier.set_params(verbose=0)

    assert (loaded.transformer.cache, loaded.verbose) == (None, 0)
    scores = loaded.decision_function(X)
    if "tune" not in strategy:  # saves time
        clone(loaded.strategy_.estimator).fit(X, y)
    assert not folder.exists()
    assert_array_equal(scores, classifier.decision_function(X))
    if strategy == "auto":
        assert loaded.advisor_.transformer.cache is None
        assert loaded.advisor_.layer_scores_ == classifier.advisor_.layer_scores_


def test_skops_files_are_the_same(fitted, fewer_digits):
    X, _ = fewer_digits
    classifier = fitted["auto"]
    trusted = [*SKOPS_TRUSTED, "sklearn.svm._classes.LinearSVC"]

    loaded = skops.io.loads(skops.io.dumps(classifier), trusted=trusted)

    assert_array_equal(loaded.decision_function(X), classifier.decision_function(X))
    assert loaded.advisor_.layer_scores_ == classifier.advisor_.layer_scores_


@pytest.mark.parametrize("kind", [StrategyAdvisor, TransferClassifier])
def test_unfitted_estimators_keep_their_cache(kind):
    """The worker processes of a search get them by pickle."""
    transformer = CNNFeatureTransformer("tiny", cache="folder", verbose=1)

    copied = pickle.loads(pickle.dumps(kind(transformer, verbose=1)))

    assert (copied.transformer.cache, copied.transformer.verbose) == ("folder", 1)
    assert copied.verbose == 1


def through_pickle(estimator):
    return pickle.loads(pickle.dumps(estimator))


def through_skops(estimator):
    return skops.io.loads(skops.io.dumps(estimator), trusted=SKOPS_TRUSTED)


@pytest.mark.parametrize("through", [through_pickle, through_skops])
@pytest.mark.parametrize("kind", ["transformer", "classifier"])
def test_a_forged_file_does_not_write_features(
    kind, through, fitted, fewer_digits, tmp_path, monkeypatch
):
    X, _ = fewer_digits
    folder = tmp_path / "planted"
    classifier = pickle.loads(pickle.dumps(fitted["extract"]))
    forged = classifier if kind == "classifier" else classifier.estimator_[0]
    # As if the files of this class had everything in them.
    state = {**forged.__getstate__(), "verbose": 1}
    if kind == "transformer":
        state["cache"] = str(folder)
    else:
        state["transformer"] = clone(forged.transformer).set_params(cache=str(folder))
    monkeypatch.setattr(type(forged), "__getstate__", lambda self: state)

    loaded = through(forged)
    monkeypatch.undo()

    transformer = loaded if kind == "transformer" else loaded.transformer
    assert (transformer.cache, loaded.verbose) == (None, 0)
    getattr(loaded, "predict" if kind == "classifier" else "transform")(X)
    assert not folder.exists()


def test_joblib_files_load(fitted, fewer_digits):
    X, _ = fewer_digits
    file = io.BytesIO()
    joblib.dump(fitted["extract"], file)
    file.seek(0)

    found = joblib.load(file).predict_proba(X)

    assert_array_equal(found, fitted["extract"].predict_proba(X))


def test_layers_with_too_small_feature_maps_are_not_evaluated(few_digits):
    transformer = CNNFeatureTransformer(
        "tiny", pooling=2, image_size=16, image_shape=(8, 8)
    )
    fitted = TransferClassifier(transformer, cv=2, random_state=0).fit(*few_digits)

    assert list(fitted.advisor_.layer_scores_) == ["stem", "block1", "block2", "block3"]


def test_another_name_of_the_last_layer_is_accepted(make_classifier, few_digits):
    expected = make_classifier("extract").fit(*few_digits)

    for layer in ("block4", -1, "block4.1"):
        found = make_classifier("extract", layer=layer).fit(*few_digits)
        assert_array_equal(
            found.decision_function(few_digits[0]),
            expected.decision_function(few_digits[0]),
        )
    with pytest.raises(ValueError, match="layer='block3' is not used by strategy="):
        make_classifier("extract", layer="block3").fit(*few_digits)


def test_weights_may_be_as_large_as_floats_can_be(make_classifier, few_digits):
    weights = np.linspace(1, 2, len(few_digits[1]))
    expected = make_classifier("extract").fit(*few_digits, sample_weight=weights)

    found = make_classifier("extract").fit(
        *few_digits, sample_weight=2.0**1022 * weights
    )

    assert_array_equal(
        found.decision_function(few_digits[0]),
        expected.decision_function(few_digits[0]),
    )
