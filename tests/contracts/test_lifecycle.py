"""Estimators can be cloned, refitted, copied and saved at any time."""

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
from torch import nn

from skltl import (
    Backbone,
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    Preprocessing,
    PretrainedCNNClassifier,
)
from skltl.exceptions import PrecisionWarning

OTHER = {"layer": ["stem", "block2"], "pooling": "max", "image_size": 16}

# The kinds that own a network; the others contain one of these.
networks = pytest.mark.parametrize(
    "kind", ["transformer", "pretrained", "fine-tuned"], indirect=True
)


def test_a_clone_has_the_parameters_and_nothing_else(images):
    fitted = CNNFeatureTransformer("tiny", **OTHER).fit(images)

    cloned = clone(fitted)

    assert cloned.get_params() == fitted.get_params()
    assert vars(cloned) == vars(CNNFeatureTransformer("tiny", **OTHER))


def test_a_second_fit_leaves_nothing_of_the_first(images):
    rows = np.random.default_rng(0).random((5, 48))
    again = CNNFeatureTransformer("tiny", image_shape=(4, 4, 3)).fit(rows)

    again.set_params(image_shape=None, **OTHER).fit(images)

    fresh = CNNFeatureTransformer("tiny", **OTHER).fit(images)
    assert vars(again).keys() == vars(fresh).keys()
    assert_array_equal(again.transform(images), fresh.transform(images))


def test_a_failed_first_fit_leaves_the_estimator_unfitted(images):
    transformer = CNNFeatureTransformer("tiny", layer="block9")

    with pytest.raises(ValueError, match="block9"):
        transformer.fit(images)

    with pytest.raises(NotFittedError):
        transformer.transform(images)


def test_a_failed_fit_keeps_the_last_one(images):
    fitted = CNNFeatureTransformer("tiny", image_size=16).fit(images)
    expected = fitted.transform(images)

    with pytest.raises(ValueError, match="block9"):
        fitted.set_params(backbone="alexnet", layer="block9").fit(images)

    assert_array_equal(fitted.transform(images), expected)


def test_a_failed_fit_on_rows_keeps_the_last_one():
    rows = np.random.default_rng(0).random((3, 64))
    fitted = CNNFeatureTransformer("tiny", image_shape=(8, 8), image_size=16).fit(rows)
    expected = fitted.transform(rows)

    with pytest.raises(ValueError, match="block9"):
        fitted.set_params(layer="block9", image_shape=(4, 4)).fit(rows[:, :16])
    fitted.set_params(layer="last", image_shape=(8, 8))
    with pytest.raises(ValueError, match=r"\b63\b"):
        fitted.fit(rows[:, :63])

    assert_array_equal(fitted.transform(rows), expected)


def fit_in_a_pipeline(fitted, X, y):
    return make_pipeline(clone(fitted)).fit(X, y)[0]


def dump_and_load(fitted, X, y):
    file = io.BytesIO()
    joblib.dump(fitted, file)
    return joblib.load(file)


# None of these may change the output of a fitted estimator.
STEPS = {
    "clone and fit": lambda fitted, X, y: clone(fitted).fit(X, y),
    "fit again": lambda fitted, X, y: fitted.fit(X, y),
    "pickle": lambda fitted, X, y: pickle.loads(pickle.dumps(fitted)),
    "joblib": dump_and_load,
    "deepcopy": lambda fitted, X, y: copy.deepcopy(fitted),
    "copy": lambda fitted, X, y: copy.copy(fitted),
    "set its own parameters": lambda fitted, X, y: fitted.set_params(
        **fitted.get_params()
    ),
    "pipeline of a clone": fit_in_a_pipeline,
}


@pytest.mark.parametrize(
    "order",
    [list(STEPS), pytest.param(list(STEPS)[::-1], marks=pytest.mark.slow)],
    ids=["forwards", "backwards"],
)
def test_copies_files_and_refits_keep_the_output(order, kind, fitted, images, labels):
    expected = kind.output(fitted, images)

    for step in order:
        fitted = STEPS[step](fitted, images, labels)

        assert_array_equal(kind.output(fitted, images), expected, err_msg=step)


@networks
def test_parameters_of_the_network_take_effect_in_the_next_fit(kind, fitted, images):
    expected = kind.output(fitted, images)
    changed = {
        "backbone": "alexnet",
        "weights": "nothing",
        "layer": "block1",
        "pooling": "max",
        "image_size": 64,
        "image_shape": (4, 4),
    }
    changed = {name: changed[name] for name in changed.keys() & fitted.get_params()}
    assert len(changed) >= 4

    for name, value in changed.items():
        fitted.set_params(**{name: value})

        assert_array_equal(kind.output(fitted, images), expected, err_msg=name)
    loaded = pickle.loads(pickle.dumps(fitted))
    assert_array_equal(kind.output(loaded, images), expected)


@networks
def test_a_wrong_parameter_is_refused_after_fit_too(kind, fitted, images):
    wrong = {
        "precision": "x",
        "batch_size": -5,
        "pooling": 0,
        "device": 3,
        "engine": "steam",
        "decode": "quick",
        "n_jobs": "all",
    }
    wrong = {name: wrong[name] for name in wrong.keys() & fitted.get_params()}
    assert len(wrong) >= 6

    for name, value in wrong.items():
        right = fitted.get_params()[name]
        fitted.set_params(**{name: value})

        with pytest.raises(ValueError, match=f"The '{name}' parameter of"):
            kind.output(fitted, images)
        fitted.set_params(**{name: right})


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_size_of_a_pretrained_classifier_is_that_of_its_network(
    batch_size, images
):
    sizes = []

    class Recording(nn.Conv2d):
        def forward(self, batch):
            sizes.append(len(batch))
            return super().forward(batch)

    own = Backbone.from_blocks(
        "recording",
        {"stem": Recording(3, 2, 3)},
        nn.Sequential(nn.Flatten(), nn.Linear(2 * 6 * 6, 2)),
        preprocessing=Preprocessing(8),
    )
    classifier = PretrainedCNNClassifier(own, engine="torch", batch_size=batch_size)
    classifier.fit(images)
    sizes.clear()

    classifier.predict(images)

    assert set(sizes) == {batch_size}


def test_inconsistent_labels_are_refused_before_any_image_is_read(kind, images, labels):
    estimator = clone(kind.make(images, labels))
    X = ["there is no such file.png"] * 9

    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        estimator.fit(X, labels[:-1])


@networks
def test_a_bfloat16_estimator_runs_in_float32_where_bfloat16_is_not_native(
    kind, fit_once, images, monkeypatch
):
    exact = fit_once(kind).set_params(precision="float32")
    fitted = fit_once(kind).set_params(precision="auto")
    monkeypatch.setattr(fitted, "precision_", "bfloat16")
    saved = pickle.dumps(fitted)
    monkeypatch.setattr("skltl._parameters.has_native_bfloat16", lambda device: False)

    loaded = pickle.loads(saved)
    with pytest.warns(PrecisionWarning, match="float32") as warned:
        found = kind.output(loaded, images)

    assert len(warned) == 1
    assert_array_equal(found, kind.output(exact, images))


def test_a_float32_estimator_stays_float32_where_bfloat16_is_native(
    images, monkeypatch
):
    fitted = CNNFeatureTransformer("tiny", precision="float32", image_size=16)
    expected = fitted.fit_transform(images)
    monkeypatch.setattr("skltl._parameters.has_native_bfloat16", lambda device: True)

    fitted.set_params(precision="auto")

    assert_array_equal(fitted.transform(images), expected)
    assert clone(fitted).fit(images).precision_ == "bfloat16"


def test_a_saved_estimator_keeps_no_folder_and_no_verbosity(images, labels, tmp_path):
    settings = {"cache": tmp_path / "cache", "verbose": 1, "image_size": 16}
    fitted = CNNFeatureTransformer("tiny", **settings).fit(images)
    classifier = FineTunedCNNClassifier(
        "tiny",
        layer="block1",
        head_epochs=1,
        finetune_epochs=0,
        checkpoint=tmp_path / "fit",
        **settings,
    )
    classifier.fit(images, labels)

    loaded, loaded_classifier = pickle.loads(pickle.dumps([fitted, classifier]))

    assert (loaded.cache, loaded.verbose) == (None, 0)
    found = loaded_classifier.get_params()
    assert (found["cache"], found["checkpoint"], found["verbose"]) == (None, None, 0)
    assert fitted.cache == tmp_path / "cache"  # the one in memory keeps it
    unfitted = pickle.loads(pickle.dumps(clone(fitted)))
    assert unfitted.cache == str(tmp_path / "cache")  # for the workers of a search


def test_changing_the_list_given_as_image_shape_has_no_effect():
    rows, shape = np.random.default_rng(0).random((6, 64)), [8, 8]
    fitted = CNNFeatureTransformer("tiny", image_shape=shape, image_size=16).fit(rows)
    expected = fitted.transform(rows)

    shape[:] = [4, 16]

    assert_array_equal(fitted.transform(rows), expected)


@pytest.mark.parametrize("kind", ["pretrained"], indirect=True)
def test_an_image_has_the_same_probabilities_alone(kind, fitted, images):
    alone = [fitted.predict_proba(images[[row]])[0] for row in range(3)]

    assert_array_equal(alone, fitted.predict_proba(images)[:3])
