"""Fits under odd conditions: they do what was asked, or say what is wrong."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.ensemble import BaggingClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.multiclass import OneVsOneClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from tiny_classifier import classifier, losses
from torch import nn

from skltl import CNNFeatureTransformer, FineTunedCNNClassifier, make_feature_pipeline
from skltl.exceptions import TrainingError
from skltl.finetuning._training import Learner


@pytest.mark.parametrize(
    "last",
    [
        SVC(kernel="linear"),
        OneVsOneClassifier(LogisticRegression()),
        BaggingClassifier(LogisticRegression(), 3),
        LinearRegression(),
    ],
    ids=lambda last: type(last).__name__,
)
def test_pipelines_that_no_head_can_stand_for_are_refused(last, digits):
    chosen = digits[1] < 3
    X, y = digits[0][chosen][:60], digits[1][chosen][:60]
    transformer = CNNFeatureTransformer("tiny", image_shape=(8, 8), image_size=32)
    pipeline = make_pipeline(transformer, last).fit(X, y)

    with pytest.raises(ValueError, match=type(last).__name__):
        FineTunedCNNClassifier.from_pipeline(pipeline)


def test_what_a_pipeline_says_cannot_be_said_otherwise(digits):
    pipeline = make_feature_pipeline("tiny", image_shape=(8, 8), image_size=32)
    pipeline.fit(digits[0][:30], digits[1][:30])

    with pytest.raises(ValueError, match="says already what dropout, layer shall be"):
        FineTunedCNNClassifier.from_pipeline(pipeline, layer="block1", dropout=0.5)
    with pytest.raises(ValueError, match="A fitted Pipeline is expected, not str"):
        FineTunedCNNClassifier.from_pipeline("pipeline")


def test_numpys_integers_are_numbers_too(digits):
    X, y = digits[0][:60], digits[1][:60]

    found = classifier(unfreeze=np.int64(2)).fit(X, y)

    assert found.stages_ == classifier(unfreeze=2).fit(X, y).stages_


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pooling": "max"}, "other new layers"),
        ({"hidden_units": (7,)}, "other new layers"),
        ({"dropout": 0.5}, "other new layers"),
        ({"layer": "block2"}, "'tiny' at 'block3', not 'tiny' at 'block2'"),
        ({"image_size": 24}, "prepared in another way"),
    ],
)
def test_a_warm_start_of_another_network_is_refused(changed, message, digits):
    X, y = digits[0][:60], digits[1][:60]
    warm = classifier(warm_start=True).fit(X, y)

    with pytest.raises(ValueError, match=message):
        warm.set_params(**changed).fit(X, y)


def test_what_learns_drops_out_and_follows_the_batch():
    parts = [nn.Conv2d(3, 4, 1), nn.Dropout(), nn.BatchNorm2d(4, affine=False)]

    for learner, expected in (
        (Learner(parts, nn.Identity(), False), [True, True, True]),
        (Learner(parts, nn.Identity(), True), [True, True, False]),
        (Learner(parts, nn.Identity(), True, True), [False, False, False]),
    ):
        assert [part.training for part in learner.train().backbone] == expected


def test_weights_count_in_the_smallest_batch_too(digits):
    X, y = digits[0][:60], digits[1][:60]
    settings = {"batch_size": 1, "head_init": "random", "unfreeze": None}
    weights = np.where(y == 1, 100.0, 1.0)

    plain = classifier(**settings).fit(X, y)
    weighted = classifier(**settings).fit(X, y, sample_weight=weights)
    scaled = classifier(**settings).fit(X, y, sample_weight=weights * 1e6)

    of_ones = [one.predict_proba(X)[:, 1].mean() for one in (plain, weighted)]
    assert of_ones[1] > 1.05 * of_ones[0]
    assert_allclose(scaled.decision_function(X), weighted.decision_function(X), 1e-3)


@pytest.mark.parametrize("class_weight", [{0: -1}, {0: np.nan}])
def test_weights_that_make_no_sense_are_refused(class_weight, digits):
    with pytest.raises(ValueError, match="class_weight must be finite numbers"):
        classifier(class_weight=class_weight).fit(digits[0][:60], digits[1][:60])


def test_a_last_step_that_explodes_is_told(digits):
    exploding = classifier(
        backbone_lr=1e30, schedule="constant", batch_size=100, finetune_epochs=1
    )

    with pytest.raises(
        TrainingError, match=r"epoch 1 of the fine-tuning stage.*1e\+30"
    ):
        exploding.fit(digits[0][:60], digits[1][:60])


def test_a_stage_that_makes_things_worse_does_not_count(digits):
    X, y = digits[0][:200], digits[1][:200]
    settings = {"early_stopping": True, "validation_fraction": 0.25}

    tuned = classifier(backbone_lr=30.0, schedule="constant", **settings).fit(X, y)

    assert tuned.history_[-1]["validation_score"] < 0.5  # worse, indeed
    assert tuned.score(digits[0][200:400], digits[1][200:400]) > 0.8


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_users_modes_change_nothing(mode, precision, digits):
    X, y = digits[0][:60], digits[1][:60]
    settings = {"unfreeze": 2, "precision": precision}
    expected = classifier(**settings).fit(X, y).decision_function(X)

    with mode():
        found = classifier(**settings).fit(X, y).decision_function(X)

    assert_array_equal(found, expected)


@pytest.mark.parametrize("unfreeze", [1, "all"])
def test_the_users_default_type_changes_nothing(unfreeze, digits):
    X, y = digits[0][:60], digits[1][:60]
    expected = classifier(unfreeze=unfreeze).fit(X, y)

    torch.set_default_dtype(torch.float64)
    try:
        found = classifier(unfreeze=unfreeze).fit(X, y)
        random = classifier(unfreeze="all", weights=None, random_state=9).fit(X, y)
    finally:
        torch.set_default_dtype(torch.float32)

    assert losses(found) == losses(expected)
    again = classifier(unfreeze="all", weights=None, random_state=9).fit(X, y)
    assert np.isfinite([*losses(random), *losses(again)]).all()


def test_widths_and_classes_that_are_none_are_refused(digits):
    X, y = digits[0][:20], digits[1][:20]

    for name in ("conv_channels", "hidden_units"):
        for width in (0, -3, 2.5, "a", True):
            with pytest.raises(ValueError, match=f"{name} must be positive integers"):
                classifier(**{name: (width,)}).fit(X, y)
    with pytest.raises(ValueError, match="There is one class only, 3"):
        classifier().fit(X, np.full(20, 3))
