"""The classifier as an estimator: its head, copies and files, warm starts, modes."""

import copy
import pickle

import joblib
import numpy as np
import pytest
import skops.io
import torch
from numpy.testing import assert_array_equal
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from tiny_classifier import classifier, losses

import skltl
from skltl import FineTunedCNNClassifier, Preprocessing


def test_the_head_has_the_specified_layers(data):
    fitted = classifier(
        conv_channels=(16,), hidden_units=(12, 8), dropout=0.1, pooling="avgmax"
    ).fit(*data)

    kinds = [type(layer).__name__ for layer in fitted.head_]
    assert kinds == [
        *("Conv2d", "ReLU", "Pool", "Standardize", "Linear", "ReLU", "Dropout"),
        *("Linear", "ReLU", "Dropout", "Linear"),
    ]
    assert fitted.predict_proba(data[0][:5]).shape == (5, 10)
    assert fitted.transform(data[0][:5]).shape == (5, 2 * 192)


def test_convolutions_need_a_feature_map(data):
    blocks = {
        "stem": torch.nn.Conv2d(3, 4, 3),
        "fc": torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
    }
    own = skltl.Backbone.from_blocks("own", blocks, preprocessing=Preprocessing(16))
    made = FineTunedCNNClassifier(
        own, layer="fc", conv_channels=(4,), image_shape=(8, 8)
    )

    with pytest.raises(ValueError, match="layer returns a vector of 4 features"):
        made.fit(*data)


@pytest.mark.parametrize("name", ["conv_channels", "hidden_units"])
@pytest.mark.parametrize("width", [0, -3, 2.5, "a", True])
def test_widths_must_be_positive_integers(name, width, data):
    with pytest.raises(ValueError, match=f"{name} must be positive integers"):
        classifier(**{name: (width,)}).fit(*data)


@pytest.mark.parametrize(
    "saved",
    [
        lambda fitted, folder: pickle.loads(pickle.dumps(fitted)),
        lambda fitted, folder: joblib.load(joblib.dump(fitted, folder / "file")[0]),
        lambda fitted, folder: skops.io.loads(
            skops.io.dumps(fitted), trusted=skltl.SKOPS_TRUSTED
        ),
        lambda fitted, folder: copy.deepcopy(fitted),
    ],
    ids=["pickle", "joblib", "skops", "deepcopy"],
)
def test_copies_and_files_predict_the_same(saved, data, fitted_hidden, tmp_path):
    loaded = saved(fitted_hidden, tmp_path)

    expected = fitted_hidden.decision_function(data[0])
    assert_array_equal(loaded.decision_function(data[0]), expected)
    assert loaded.history_ == fitted_hidden.history_
    assert loaded.stages_ == fitted_hidden.stages_


def test_files_hold_no_optimizer(fitted):
    weights = [
        *(
            value
            for block in fitted.network_.blocks.values()
            for value in block.state_dict().values()
        ),
        *fitted.head_.state_dict().values(),
    ]

    n_bytes = len(pickle.dumps(fitted))

    expected = sum(value.numel() * value.element_size() for value in weights)
    assert n_bytes < expected + 2e4


def test_a_head_with_an_unknown_layer_is_not_saved_as_another(fitted_hidden):
    changed = copy.deepcopy(fitted_hidden)
    changed.head_[3] = torch.nn.GELU()

    with pytest.raises(TypeError, match="A head with a GELU cannot be saved"):
        pickle.dumps(changed)


def test_the_format_of_a_saved_file_is_checked_before_its_contents(fitted):
    state = {**fitted.__getstate__(), "_format": 99, "head_": None, "network_": None}

    with pytest.raises(ValueError, match="in format 99, .* Load it with that version"):
        FineTunedCNNClassifier().__setstate__(state)


@pytest.mark.parametrize("n_jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_searches_over_pipelines(n_jobs, digits):
    X, y = digits[0][:90], digits[1][:90]
    pipeline = make_pipeline(FunctionTransformer(), classifier(head_epochs=1))
    grid = {"finetunedcnnclassifier__unfreeze": [None, 1]}

    search = GridSearchCV(clone(pipeline), grid, cv=2, n_jobs=n_jobs).fit(X, y)

    assert search.best_score_ > 0.5


def test_a_warm_start_continues_the_previous_fit(data):
    X, y = data
    warm = classifier(warm_start=True, schedule="constant").fit(X, y)
    last = losses(warm)[-1]

    warm.set_params(head_epochs=0).fit(X, y)

    assert losses(warm)[-1] < last
    for changed, message in (
        (y % 2, r"the same classes as in the previous fit: .*, not \[0, 1\]"),
        (np.c_[y % 2, y > 4], "the same kind of targets .*: classes, not labels"),
    ):
        with pytest.raises(ValueError, match=message):
            warm.fit(X, changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pooling": "max"}, "the same head"),
        ({"hidden_units": (7,)}, "the same head"),
        ({"dropout": 0.5}, "the same head"),
        ({"layer": "block2"}, "the same layer.*: block3, not block2"),
        ({"image_size": 24}, "the same preprocessing"),
        ({"backbone": "own"}, "the same backbone"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_a_warm_start_with_another_network_is_refused(changed, message, data, fitted):
    if "backbone" in changed:
        changed = {"backbone": fitted.to_transformer().backbone}
    warm = copy.deepcopy(fitted).set_params(warm_start=True, **changed)

    with pytest.raises(ValueError, match=message):
        warm.fit(*data)


@pytest.fixture(scope="module")
def decisions(data):
    """Decisions without any of the user's modes, by precision."""
    return {
        precision: classifier(unfreeze=2, precision=precision)
        .fit(*data)
        .decision_function(data[0])
        for precision in ("float32", "bfloat16")
    }


@pytest.mark.parametrize(
    ("mode", "precision"),
    [
        (torch.no_grad, "float32"),
        (torch.inference_mode, "float32"),
        (torch.inference_mode, "bfloat16"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "float32"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "bfloat16"),
    ],
    ids=["no_grad", "inference", "inference bf16", "autocast", "autocast bf16"],
)
def test_the_users_modes_change_nothing(mode, precision, data, decisions):
    with mode():
        fitted = classifier(unfreeze=2, precision=precision).fit(*data)
        found = fitted.decision_function(data[0])

    assert_array_equal(found, decisions[precision])


def test_the_users_default_dtype_changes_nothing(data, fitted):
    scratch = classifier(unfreeze="all", weights=None, random_state=9)
    expected = losses(scratch.fit(*data))
    skltl.release_memory()  # so that random weights are drawn again

    torch.set_default_dtype(torch.float64)
    try:
        found = classifier().fit(*data)
        random = clone(scratch).fit(*data)
    finally:
        torch.set_default_dtype(torch.float32)

    assert losses(found) == losses(fitted)
    assert losses(random) == expected


@pytest.mark.parametrize(
    "wrong", [{"hidden_units": (0,)}, {"validation_fraction": 0.99}], ids=str
)
def test_parameters_are_checked_before_weights_are_loaded(wrong, data):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        classifier(weights="nowhere.pt", **wrong).fit(*data)
