"""Estimators can be cloned, refitted, copied and saved at any time of their life."""

import copy
import io
import pickle

import joblib
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    PretrainedCNNClassifier,
    StrategyAdvisor,
    TransferClassifier,
    make_feature_pipeline,
)
from skltl.exceptions import PrecisionWarning

OTHER = {"layer": ["stem", "block2"], "pooling": "max", "image_size": 32}


def test_a_clone_has_the_parameters_and_nothing_else(images):
    fitted = CNNFeatureTransformer("tiny", **OTHER).fit(images)

    cloned = clone(fitted)

    assert cloned.get_params() == fitted.get_params()
    assert vars(cloned) == vars(CNNFeatureTransformer("tiny", **OTHER))


def test_fitting_again_leaves_nothing_of_the_first_fit(images):
    rows = np.random.default_rng(0).random((5, 48))
    again = CNNFeatureTransformer("tiny", image_shape=(4, 4, 3)).fit(rows)

    again.set_params(image_shape=None, **OTHER).fit(images)

    fresh = CNNFeatureTransformer("tiny", **OTHER).fit(images)
    assert vars(again).keys() == vars(fresh).keys()
    np.testing.assert_array_equal(again.transform(images), fresh.transform(images))


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda fitted: pickle.loads(pickle.dumps(fitted))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_of_a_fitted_estimator_are_fitted(images, copied):
    fitted = CNNFeatureTransformer("tiny", **OTHER).fit(images)

    np.testing.assert_array_equal(
        copied(fitted).transform(images), fitted.transform(images)
    )


def test_a_fit_on_rows_that_fails_leaves_the_last_one():
    rows = np.random.default_rng(0).random((3, 64))
    fitted = CNNFeatureTransformer("tiny", image_shape=(8, 8)).fit(rows)
    expected = fitted.transform(rows)

    with pytest.raises(ValueError, match="block9"):
        fitted.set_params(layer="block9", image_shape=(4, 4)).fit(rows[:, :16])
    fitted.set_params(layer="last", image_shape=(8, 8))
    with pytest.raises(ValueError, match="does not fit rows of 63"):
        fitted.fit(rows[:, :63])

    np.testing.assert_array_equal(fitted.transform(rows), expected)


def test_a_first_fit_that_fails_leaves_the_estimator_unfitted(images):
    transformer = CNNFeatureTransformer("tiny", layer="block9")

    with pytest.raises(ValueError, match="block9"):
        transformer.fit(images)

    with pytest.raises(NotFittedError):
        transformer.transform(images)


def test_a_fit_that_fails_leaves_the_last_one(images):
    fitted = CNNFeatureTransformer("tiny").fit(images)
    expected = fitted.transform(images)

    with pytest.raises(ValueError, match="block9"):
        fitted.set_params(backbone="alexnet", layer="block9").fit(images)

    np.testing.assert_array_equal(fitted.transform(images), expected)


SMALL = {"image_size": 32, "random_state": 0}
LABELS = np.arange(9) % 2


def tuned():
    return FineTunedCNNClassifier(
        "tiny", layer="block3", unfreeze=1, head_epochs=2, finetune_epochs=1, **SMALL
    )


def tuned_transformer(X):
    return tuned().fit(X, LABELS).to_transformer()


def classifier_of_a_pipeline(X):
    pipeline = make_feature_pipeline("tiny", "softmax", layer="block3", **SMALL)
    return FineTunedCNNClassifier.from_pipeline(
        pipeline.fit(X, LABELS), unfreeze=1, finetune_epochs=1, random_state=0
    )


# Of each public estimator, and of those that are returned fitted: what makes it, and
# what it gives for images.
ESTIMATORS = {
    "transformer": (
        lambda X: CNNFeatureTransformer("tiny", layer=["stem", "block2"], **SMALL),
        lambda fitted, X: fitted.transform(X),
    ),
    "random weights": (
        lambda X: CNNFeatureTransformer("tiny", weights=None, **SMALL),
        lambda fitted, X: fitted.transform(X),
    ),
    "pretrained": (
        lambda X: PretrainedCNNClassifier("tiny", **SMALL),
        lambda fitted, X: fitted.predict_proba(X),
    ),
    "pretrained, learned map": (
        lambda X: PretrainedCNNClassifier("tiny", class_map="learn", **SMALL),
        lambda fitted, X: fitted.predict_proba(X),
    ),
    "tuned": (lambda X: tuned(), lambda fitted, X: fitted.predict_proba(X)),
    "tuned transformer": (tuned_transformer, lambda fitted, X: fitted.transform(X)),
    "from a pipeline": (
        classifier_of_a_pipeline,
        lambda fitted, X: fitted.predict_proba(X),
    ),
    "transfer": (
        lambda X: TransferClassifier(
            CNNFeatureTransformer("tiny", **SMALL), strategy="extract"
        ),
        lambda fitted, X: fitted.predict_proba(X),
    ),
    "advisor": (
        lambda X: StrategyAdvisor(
            CNNFeatureTransformer("tiny", image_size=32), cv=2, random_state=0
        ),
        lambda fitted, X: np.array(list(fitted.layer_scores_.values())),
    ),
}


def in_a_pipeline(fitted, X):
    return make_pipeline(clone(fitted)).fit(X, LABELS)[0]


def through_joblib(fitted, X):
    file = io.BytesIO()
    joblib.dump(fitted, file)
    return joblib.load(file)


# What may happen to a fitted estimator, none of which may change what it gives.
STEPS = {
    "clone and fit": lambda fitted, X: clone(fitted).fit(X, LABELS),
    "fit again": lambda fitted, X: fitted.fit(X, LABELS),
    "pickle": lambda fitted, X: pickle.loads(pickle.dumps(fitted)),
    "joblib": through_joblib,
    "deepcopy": lambda fitted, X: copy.deepcopy(fitted),
    "copy": lambda fitted, X: copy.copy(fitted),
    "set_params of its own": lambda fitted, X: fitted.set_params(**fitted.get_params()),
    "a pipeline of a clone": in_a_pipeline,
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("order", [list(STEPS), list(STEPS)[::-1]], ids=["->", "<-"])
def test_nothing_that_happens_to_an_estimator_changes_what_it_gives(
    name, order, images
):
    make, outcome = ESTIMATORS[name]
    fitted = make(images).fit(images, LABELS)
    expected = outcome(fitted, images)

    for step in order:
        fitted = STEPS[step](fitted, images)

        assert_array_equal(outcome(fitted, images), expected, err_msg=step)


@pytest.mark.parametrize(
    "changed",
    [
        {"backbone": "alexnet"},
        {"weights": "nothing"},
        {"layer": "block1"},
        {"pooling": "max"},
        {"image_size": 64},
        {"image_shape": (4, 4)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["transformer", "pretrained", "tuned"])
def test_what_a_network_is_counts_from_the_next_fit_on(name, changed, images):
    make, outcome = ESTIMATORS[name]
    fitted = make(images).fit(images, LABELS)
    if next(iter(changed)) not in fitted.get_params():
        pytest.skip("has no such parameter")
    expected = outcome(fitted, images)

    fitted.set_params(**changed)

    assert_array_equal(outcome(fitted, images), expected)
    loaded = pickle.loads(pickle.dumps(fitted))
    assert_array_equal(outcome(loaded, images), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"precision": "x"},
        {"batch_size": -5},
        {"pooling": 0},
        {"device": 3},
        {"engine": "steam"},
        {"decode": "quick"},
        {"n_jobs": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["transformer", "pretrained", "tuned"])
def test_a_wrong_parameter_is_refused_after_the_fit_too(name, wrong, images):
    make, outcome = ESTIMATORS[name]
    fitted = make(images).fit(images, LABELS)
    if next(iter(wrong)) not in fitted.get_params():
        pytest.skip("has no such parameter")

    fitted.set_params(**wrong)

    with pytest.raises(ValueError, match=f"The '{next(iter(wrong))}' parameter of"):
        outcome(fitted, images)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_of_a_pretrained_classifier_is_that_of_its_network(
    batch_size, images
):
    classifier = PretrainedCNNClassifier("tiny", batch_size=batch_size).fit(images)
    seen = []
    (first, *_) = classifier.network_.blocks.values()

    def note(module, args, output):
        seen.append(len(args[0]))

    class Watched(type(first)):
        def forward(self, batch):
            seen.append(len(batch))
            return super().forward(batch)

    first.__class__ = Watched
    try:
        from skltl import release_memory

        release_memory()
        classifier.predict(images)
    finally:
        first.__class__ = Watched.__base__
        release_memory()

    assert set(seen) == {batch_size}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_labels_of_another_number_are_refused_before_any_image_is_read(name, images):
    make, _ = ESTIMATORS[name]
    estimator = clone(make(images))
    X = ["there is no such file.png"] * 9

    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        estimator.fit(X, LABELS[:-1])


@pytest.mark.parametrize("name", ["transformer", "pretrained", "tuned"])
def test_a_model_of_bfloat16_runs_in_float32_where_that_is_not_native(
    name, images, monkeypatch
):
    make, outcome = ESTIMATORS[name]
    exact = make(images).set_params(precision="float32").fit(images, LABELS)
    fitted = exact.set_params(precision="auto")
    monkeypatch.setattr(fitted, "precision_", "bfloat16")
    saved = pickle.dumps(fitted)
    monkeypatch.setattr(
        "skltl.features._estimators.has_native_bfloat16", lambda device: False
    )

    loaded = pickle.loads(saved)
    with pytest.warns(PrecisionWarning, match="computes in float32") as warned:
        found = outcome(loaded, images)

    assert len(warned) == 1
    exact.set_params(precision="float32")
    assert_array_equal(found, outcome(exact, images))


def test_a_model_of_float32_stays_there_where_bfloat16_is_native(images, monkeypatch):
    fitted = CNNFeatureTransformer("tiny", precision="float32").fit(images)
    expected = fitted.transform(images)
    monkeypatch.setattr("skltl._parameters.has_native_bfloat16", lambda device: True)

    fitted.set_params(precision="auto")

    assert_array_equal(fitted.transform(images), expected)
    again = clone(fitted).fit(images)
    assert again.precision_ == "bfloat16"


def test_a_saved_estimator_says_nothing_of_where_to_write(images, tmp_path):
    settings = {"cache": tmp_path / "cache", "verbose": 1}
    fitted = CNNFeatureTransformer("tiny", **settings).fit(images)
    classifier = tuned().set_params(checkpoint=tmp_path / "fit", **settings)
    classifier.fit(images, LABELS)

    loaded, loaded_classifier = pickle.loads(pickle.dumps([fitted, classifier]))

    assert (loaded.cache, loaded.verbose) == (None, 0)
    found = loaded_classifier.get_params()
    assert (found["cache"], found["checkpoint"], found["verbose"]) == (None, None, 0)
    assert fitted.cache == tmp_path / "cache"  # the one in memory keeps it
    unfitted = pickle.loads(pickle.dumps(clone(fitted)))
    assert unfitted.cache == str(tmp_path / "cache")  # for the workers of a search


def test_a_list_as_image_shape_stays_the_users_own():
    rows, shape = np.random.default_rng(0).random((6, 64)), [8, 8]
    fitted = CNNFeatureTransformer("tiny", image_shape=shape, image_size=32).fit(rows)
    expected = fitted.transform(rows)

    shape[:] = [4, 16]

    assert_array_equal(fitted.transform(rows), expected)


def test_probabilities_of_an_image_are_the_same_alone(images):
    fitted = PretrainedCNNClassifier("tiny", image_size=32).fit(images)

    alone = [fitted.predict_proba(images[row : row + 1])[0] for row in range(3)]

    assert_array_equal(alone, fitted.predict_proba(images)[:3])
