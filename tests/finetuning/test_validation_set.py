"""A validation set of one's own."""

import copy

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import config_context
from sklearn.metrics import accuracy_score, log_loss, mean_squared_error, r2_score
from sklearn.model_selection import cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from tiny_classifier import classifier, losses, regressor

from skltl import FineTunedCNNClassifier
from skltl.exceptions import ImageReadError
from skltl.finetuning._data import hold_out


@pytest.fixture
def more(digits):
    """Forty other digits, and their labels."""
    return digits[0][60:100], digits[1][60:100]


@pytest.mark.parametrize("class_weight", [None, "balanced", {3: 20}])
def test_it_is_evaluated_after_each_epoch(class_weight, data, more):
    X_val, y_val = more
    plain = classifier(class_weight=class_weight).fit(*data)

    found = classifier(class_weight=class_weight)
    found.fit(*data, X_val=X_val, y_val=y_val)

    # Training is the same as without it.
    assert losses(found) == losses(plain)
    assert_array_equal(found.predict(X_val), plain.predict(X_val))
    last = found.history_[-1]
    proba = found.predict_proba(X_val)
    assert last["validation_score"] == accuracy_score(y_val, found.predict(X_val))
    expected = log_loss(y_val, proba, labels=found.classes_)
    assert_allclose(last["validation_loss"], expected, rtol=1e-4)


def test_it_gives_what_images_that_are_held_out_give(digits):
    """The same images are held out by the fit, and given to it."""
    X, y = digits[0][:100], digits[1][:100]
    early = {"early_stopping": True, "patience": 1, "head_epochs": 6}
    held_out = classifier(validation_fraction=0.3, **early).fit(X, y)
    _, targets = np.unique(y, return_inverse=True)
    training, validation = hold_out(targets, None, 0.3, 0)
    by_hand = classifier(batch_size=100, **early)
    held_out.set_params(batch_size=100).fit(X, y)  # the order of images has no effect

    by_hand.fit(X[training], y[training], X_val=X[validation], y_val=y[validation])

    assert by_hand.n_epochs_ == held_out.n_epochs_
    for name in ("loss", "validation_loss", "validation_score"):
        values = [
            [record[name] for record in one.history_] for one in (by_hand, held_out)
        ]
        assert_allclose(*values, rtol=1e-3)


def test_early_stopping_keeps_its_best_epoch(data, more):
    X_val, y_val = more
    early = classifier(early_stopping=True, patience=2, head_epochs=8)

    early.fit(*data, X_val=X_val, y_val=y_val)

    kept = accuracy_score(y_val, early.predict(X_val))
    assert early.best_validation_score_ == kept
    assert kept >= max(one["validation_score"] for one in early.history_)


def test_weights_count(data, more):
    X_val, y_val = more
    weights = np.linspace(0, 2, 40)
    found = classifier().fit(*data, X_val=X_val, y_val=y_val, sample_weight_val=weights)
    expected = accuracy_score(y_val, found.predict(X_val), sample_weight=weights)
    assert_allclose(found.history_[-1]["validation_score"], expected)
    assert losses(found) == losses(classifier().fit(*data))


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_of_values(n_outputs, data, more):
    def values(X):
        columns = np.column_stack([X.mean(axis=1), X[:, 20:44].mean(axis=1)])
        return columns[:, 0] if n_outputs == 1 else columns

    X, X_val = data[0], more[0]
    found = regressor().fit(X, values(X), X_val=X_val, y_val=values(X_val))
    predicted, last = found.predict(X_val), found.history_[-1]
    assert_allclose(
        last["validation_score"], r2_score(values(X_val), predicted), atol=1e-3
    )
    if n_outputs == 1:  # in units of the values, see `StandardizedError`
        variance = values(X).var()
        expected = mean_squared_error(values(X_val), predicted) / variance
        assert_allclose(last["validation_loss"], expected, rtol=1e-2)


def test_of_labels(data, more):
    def labels(y):
        return np.column_stack([y % 2, y > 4]).astype(int)

    X_val, y_val = more[0], labels(more[1])
    found = classifier().fit(data[0], labels(data[1]), X_val=X_val, y_val=y_val)
    score = (found.predict(X_val) == y_val).all(axis=1).mean()
    assert found.history_[-1]["validation_score"] == score
    of_lists = classifier().fit(
        data[0], labels(data[1]).tolist(), X_val=X_val, y_val=y_val.tolist()
    )
    assert_array_equal(of_lists.predict_proba(X_val), found.predict_proba(X_val))
    assert of_lists.history_[-1]["validation_score"] == score
    with pytest.raises(ValueError, match="an indicator matrix of 2 labels"):
        found.fit(data[0], labels(data[1]), X_val=X_val, y_val=y_val[:, :1])


def test_images_of_other_kinds_and_a_cache(images, image_files, tmp_path):
    """Arrays to train on, files to validate on, with channels on other axes."""
    y = [0, 1, 2] * 3
    made = FineTunedCNNClassifier(
        "tiny", unfreeze=1, head_epochs=1, finetune_epochs=1, random_state=0
    )
    expected = made.fit(images, y, X_val=images[3:], y_val=y[3:]).history_
    tensors = torch.from_numpy(images[3:].transpose(0, 3, 1, 2))
    for X_val in (image_files[3:], tensors):
        for cache in (None, tmp_path, tmp_path):
            made.set_params(cache=cache)
            history = made.fit(images, y, X_val=X_val, y_val=y[3:]).history_
            for one, other in zip(history, expected, strict=True):
                assert one["validation_loss"] == other["validation_loss"]


def test_errors_name_the_image_and_the_set(images, image_files, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    y = [0, 1, 2] * 3
    made = FineTunedCNNClassifier("tiny", head_epochs=1, finetune_epochs=0)
    with pytest.raises(ImageReadError, match=r"Image 2 .*bad\.jpg") as caught:
        made.fit(images, y, X_val=[*image_files[:2], bad], y_val=y[:3])
    assert caught.value.__notes__ == ["It is an image of X_val."]
    with pytest.raises(ImageReadError, match=r"Image 3 .*bad\.jpg") as caught:
        made.fit([*image_files[:3], bad], y[:4], X_val=images[:2], y_val=y[:2])
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"X_val": 1}, "X_val is given without y_val"),
        ({"y_val": 1}, "y_val is given without X_val"),
        ({"sample_weight_val": 1}, "sample_weight_val is given without"),
        ({"X_val": 1, "y_val": [0] * 39}, "inconsistent numbers of samples"),
        ({"X_val": 1, "y_val": [10] * 40}, "y_val: 10 is none of the classes"),
        ({"X_val": 1, "y_val": [None] * 40}, "y_val: .* NaN or None"),
        ({"X_val": 1, "y_val": ["1"] * 40}, "y_val: '1' is none .* such as 0"),
        ({"X_val": 1, "y_val": 1, "sample_weight_val": [1]}, "weight"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(options, message, data, more):
    given = {"X_val": more[0], "y_val": more[1], "sample_weight_val": np.ones(40)}
    options = {
        name: given[name] if value == 1 else value for name, value in options.items()
    }
    with pytest.raises(ValueError, match=message):
        classifier().fit(*data, **options)
    both = classifier(validation_fraction=0.2)
    with pytest.raises(ValueError, match="exclude each other"):
        both.fit(*data, X_val=more[0], y_val=more[1])


def test_a_checkpoint_belongs_to_one_validation_set(data, more, tmp_path):
    from checkpoints import interrupt

    X_val, y_val = more
    early = {"early_stopping": True, "checkpoint": tmp_path}
    validation = {"X_val": X_val, "y_val": y_val}
    expected = classifier(early_stopping=True).fit(*data, **validation)
    interrupt(classifier(**early), *data, X_val=X_val[:20], y_val=y_val[:20])
    interrupt(classifier(**early), *data, **validation)

    found = classifier(**early).fit(*data, **validation)

    assert losses(found) == losses(expected)
    assert len(list(tmp_path.glob("*.checkpoint"))) == 1


def test_a_pipeline_transforms_it_as_scikit_learn_does(data, more):
    """By metadata routing and `transform_input`, as for gradient boosting."""
    X_val, y_val = more
    expected = classifier().fit(*data, X_val=X_val, y_val=y_val)
    with config_context(enable_metadata_routing=True):
        inverted = FunctionTransformer(lambda rows: 1 - rows)
        requesting = classifier().set_fit_request(X_val=True, y_val=True)
        pipeline = make_pipeline(inverted, requesting, transform_input=["X_val"])
        pipeline.fit(1 - data[0], data[1], X_val=1 - X_val, y_val=y_val)
        # The whole validation set, in each fold.
        requesting = copy.deepcopy(requesting)
        folds = cross_validate(
            *(requesting, *data),
            cv=2,
            return_estimator=True,
            params={"X_val": X_val, "y_val": y_val},
        )
    for one, other in zip(pipeline[-1].history_, expected.history_, strict=True):
        assert_allclose(one["validation_loss"], other["validation_loss"], rtol=1e-3)
    assert all("validation_score" in fit.history_[0] for fit in folds["estimator"])
