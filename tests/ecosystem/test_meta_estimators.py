"""Estimators of scikit-learn that contain those of skltl, whose ``X`` is images.

What they do with images is what scikit-learn does with the features of these images.
"""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from PIL import Image
from sklearn import config_context
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import (
    BaggingClassifier,
    StackingClassifier,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GroupKFold,
    HalvingGridSearchCV,
    StratifiedKFold,
    TunedThresholdClassifierCV,
    cross_val_predict,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import (
    ClassifierChain,
    MultiOutputClassifier,
    MultiOutputRegressor,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import SelfTrainingClassifier

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    FineTunedCNNRegressor,
    TransferClassifier,
    make_feature_pipeline,
)

N = 60
WEIGHTS = np.resize([0.0, 0.5, 1.0, 2.0], N)
GROUPS = np.arange(N) // 3


@pytest.fixture(scope="module")
def few_digits(digits):
    """Sixty digits as gray images, and their classes: 0, 1 or 2."""
    rows, labels = digits
    chosen = np.flatnonzero(labels < 3)[:N]
    images = (rows[chosen] * 255).astype(np.uint8).reshape(-1, 8, 8)
    return images, labels[chosen]


@pytest.fixture(scope="module")
def X(few_digits, tmp_path_factory):
    """The digits in each form, by its name."""
    folder = tmp_path_factory.mktemp("digits")
    paths = [str(folder / f"{number}.png") for number in range(N)]
    for path, image in zip(paths, few_digits[0], strict=True):
        Image.fromarray(image).save(path)
    return {
        "list": paths,
        "images": np.repeat(few_digits[0][..., None], 3, axis=-1),
        "column": np.array(paths)[:, None],
        "frame": pd.DataFrame({"image": paths}),
    }


@pytest.fixture(scope="module")
def y(few_digits):
    return few_digits[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def make_transformer(cache):
    def make_transformer(layer="block3"):
        return CNNFeatureTransformer("tiny", layer=layer, image_size=32, cache=cache)

    return make_transformer


@pytest.fixture
def make_classifier(cache):
    """Make a pipeline of skltl."""

    def make_classifier(layer="block3"):
        return make_feature_pipeline(
            "tiny", "softmax", layer=layer, image_size=32, cache=cache
        )

    return make_classifier


def head():
    """Make what follows the features in the pipelines, of scikit-learn alone."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))


def halving(classifier):
    grid = {f"{classifier.steps[-1][0]}__C": [1e-4, 1e-3, 1e-2]}
    return HalvingGridSearchCV(classifier, grid, cv=2, random_state=0)


# The page of the guide has these three groups.
ANY_FORM = {
    "search": halving,
    "calibrated": lambda classifier: CalibratedClassifierCV(classifier, cv=2),
    "frozen": lambda fitted: CalibratedClassifierCV(FrozenEstimator(fitted)),
    "threshold": lambda one: TunedThresholdClassifierCV(one, cv=2, thresholds=9),
    "stacking": lambda classifier: StackingClassifier([("one", classifier)], cv=2),
    "voting": lambda classifier: VotingClassifier([("one", classifier)], voting="soft"),
    "one-vs-rest": OneVsRestClassifier,
    "multioutput": MultiOutputClassifier,
}
COLUMN = {"bagging": lambda one: BaggingClassifier(one, n_estimators=2, random_state=0)}
FEATURES = {"self-training": SelfTrainingClassifier, "chain": ClassifierChain}
ALL = ANY_FORM | COLUMN | FEATURES

COLUMNS = ["column", "frame"]
FORMS = ["list", "images", *COLUMNS]
ACCEPTED = [*product(ANY_FORM, FORMS), *product(COLUMN, COLUMNS)]
REJECTED = [*product(COLUMN, ["list", "images"]), *product(FEATURES, FORMS)]


def targets_for(name, y):
    """Return the classes, or what the estimator takes instead of them."""
    if name in ("multioutput", "chain"):
        return np.column_stack([y == 0, y > 1]).astype(int)
    if name == "self-training":
        return np.where(np.arange(N) % 3, -1, y)
    return (y == 1).astype(int) if name == "threshold" else y


@pytest.mark.parametrize(("name", "form"), ACCEPTED)
def test_images_give_what_their_features_give(
    name, form, X, y, make_transformer, make_classifier
):
    features, X = make_transformer().fit_transform(X["list"]), X[form]
    targets = targets_for(name, y)

    found = ALL[name](make_classifier().fit(X, y)).fit(X, targets)

    expected = ALL[name](head().fit(features, y)).fit(features, targets)
    proba = found.predict_proba(X)  # of several labels, it is a list
    assert_allclose(proba, expected.predict_proba(features), rtol=1e-4)
    for attribute in ("best_threshold_", "best_score_"):
        assert getattr(found, attribute, 0) == pytest.approx(
            getattr(expected, attribute, 0)
        )


@pytest.mark.parametrize(("name", "form"), REJECTED)
def test_other_forms_are_rejected_as_the_guide_says(name, form, X, y, make_classifier):
    with pytest.raises(ValueError, match="2D|2-dim|dim 4|numeric|string to float"):
        ALL[name](make_classifier()).fit(X[form], targets_for(name, y))


@pytest.mark.parametrize("name", FEATURES)
def test_any_form_is_accepted_behind_the_features(name, X, y, make_transformer):
    features = make_transformer().fit_transform(X["list"])
    targets = targets_for(name, y)

    found = make_pipeline(make_transformer(), ALL[name](head()))

    expected = ALL[name](head()).fit(features, targets).predict_proba(features)
    for form in FORMS:
        assert_allclose(
            found.fit(X[form], targets).predict_proba(X[form]), expected, 1e-5
        )


def test_stacking_fits_predictions_of_a_cross_validation(
    X, y, make_transformer, make_classifier
):
    layers = ["block2", "block3"]
    stacking = StackingClassifier(
        [(layer, make_classifier(layer)) for layer in layers], cv=3
    )

    found = stacking.fit(X["list"], y).predict_proba(X["list"])

    held_out, predicted = [], []
    for layer in layers:
        F = make_transformer(layer).fit_transform(X["list"])
        held_out += [cross_val_predict(head(), F, y, cv=3, method="predict_proba")]
        predicted += [head().fit(F, y).predict_proba(F)]
    final = LogisticRegression().fit(np.hstack(held_out), y)
    assert_allclose(found, final.predict_proba(np.hstack(predicted)), rtol=1e-4)


# Metadata routing


@pytest.fixture
def _routing():
    with config_context(enable_metadata_routing=True):
        yield


@pytest.fixture
def requesting(_routing, cache, make_classifier, make_transformer):
    """Estimators that request metadata, by a name."""
    network = FineTunedCNNClassifier(
        "tiny",
        layer="stem",
        image_size=32,
        cache=cache,
        unfreeze=None,
        head_epochs=2,
        head_init="random",
        validation_fraction=0.3,
        random_state=0,
    )
    transfer = TransferClassifier(
        make_transformer(), strategy="extract_early", cv=2, random_state=0
    )
    pipeline = make_classifier()
    for step in ("scale", "softmax"):
        pipeline[step].set_fit_request(sample_weight=True)
    parameters = network.get_params()
    del parameters["class_weight"], parameters["label_smoothing"]
    regressor = FineTunedCNNRegressor(**parameters)
    return {
        "network": network.set_fit_request(sample_weight=True, groups=True),
        "regressor": regressor.set_fit_request(sample_weight=True, groups=True),
        "transfer": transfer.set_fit_request(sample_weight=True, groups=False),
        "pipeline": pipeline,
    }


# What the fit of each of them uses.
USED = {
    "network": {"sample_weight": WEIGHTS, "groups": GROUPS},
    "transfer": {"sample_weight": WEIGHTS},
    "pipeline": {"sample_weight": WEIGHTS},
}


def decisions(estimator, X, y, sample_weight=None, groups=None, on=None):
    """Fit a copy without routing, and return its decisions on the images."""
    metadata = {"sample_weight": sample_weight, "groups": groups}
    if isinstance(estimator, Pipeline):
        metadata = {
            f"{one}__sample_weight": sample_weight for one in estimator[1:].named_steps
        }
    with config_context(enable_metadata_routing=False):
        fitted = clone(estimator).fit(X, y, **metadata)
    return fitted.decision_function(X if on is None else on)


@pytest.mark.parametrize("kind", USED)
def test_voting_passes_weights_and_groups_on(kind, requesting, X, y):
    X, estimator, metadata = X["list"], requesting[kind], USED[kind]

    found = VotingClassifier([("one", estimator)]).fit(X, y, **metadata)

    expected = decisions(estimator, X, y, **metadata)
    assert_allclose(
        found.estimators_[0].decision_function(X), expected, rtol=1e-4, atol=1e-6
    )
    for name in metadata:
        others = {**metadata, name: None}  # would be noticed
        assert abs(decisions(estimator, X, y, **others) - expected).max() > 1e-3


def test_regressors_get_weights_and_groups(requesting, X, y):
    X, regressor, metadata = X["list"], requesting["regressor"], USED["network"]
    values = np.column_stack([y == 0, y > 1]).astype(float)

    voting = VotingRegressor([("one", regressor)]).fit(X, values[:, 0], **metadata)
    several = MultiOutputRegressor(regressor).fit(X, values, **metadata)

    found = [*voting.estimators_, *several.estimators_]
    with config_context(enable_metadata_routing=False):
        for column, one in zip(values.T[[0, 0, 1]], found, strict=True):
            expected = clone(regressor).fit(X, column, **metadata).predict(X)
            assert_allclose(one.predict(X), expected, rtol=1e-4, atol=1e-5)
            for name in metadata:
                others = {**metadata, name: None}
                without = clone(regressor).fit(X, column, **others).predict(X)
                assert abs(without - expected).max() > 1e-3


@pytest.mark.parametrize("kind", USED)
def test_calibration_passes_weights_and_groups_on(kind, requesting, X, y):
    X, estimator, folds = np.array(X["list"]), requesting[kind], GroupKFold(3)

    found = CalibratedClassifierCV(estimator, cv=folds).fit(
        X, y, sample_weight=WEIGHTS, groups=GROUPS
    )

    splits = folds.split(X, y, GROUPS)
    for one, (train, _) in zip(found.calibrated_classifiers_, splits, strict=True):
        metadata = {name: values[train] for name, values in USED[kind].items()}
        expected = decisions(estimator, X[train], y[train], **metadata, on=X)
        assert_allclose(
            one.estimator.decision_function(X), expected, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("kind", USED)
def test_bagging_passes_weights_and_groups_on(kind, requesting, X, y):
    X, metadata = X["column"], {**USED[kind]}
    del metadata["sample_weight"]  # bagging has its own: how often each image is drawn
    bagging = BaggingClassifier(requesting[kind], n_estimators=2, random_state=0)

    found = bagging.fit(X, y, **metadata)

    for one, drawn in zip(found.estimators_, found.estimators_samples_, strict=True):
        times = np.bincount(drawn, minlength=N)
        expected = decisions(one, X, y, times, **metadata)
        assert_allclose(one.decision_function(X), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", USED)
def test_stacking_passes_weights_on(kind, requesting, X, y):
    X, estimator, folds = np.array(X["list"]), requesting[kind], StratifiedKFold(2)
    if kind == "network":
        estimator.set_fit_request(groups=False)
    stacking = StackingClassifier(
        [("one", estimator)], cv=folds, stack_method="decision_function"
    )

    found = stacking.fit(X, y, sample_weight=WEIGHTS)

    expected = decisions(estimator, X, y, WEIGHTS)
    assert_allclose(found.transform(X), expected, rtol=1e-4, atol=1e-6)
    held_out = np.empty_like(expected)
    for train, test in folds.split(X, y):
        held_out[test] = decisions(
            estimator, X[train], y[train], WEIGHTS[train], on=X[test]
        )
    final = LogisticRegression().fit(held_out, y, WEIGHTS)
    assert_allclose(found.final_estimator_.coef_, final.coef_, rtol=1e-3)
