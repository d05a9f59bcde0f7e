"""No estimator and no display draws from a global generator, seeded or not."""

import random

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from sklearn.base import clone
from sklearn.datasets import load_digits

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    GradCAMDisplay,
    LayerScoresDisplay,
    PredictionGridDisplay,
    PretrainedCNNClassifier,
    StrategyAdvisor,
    StrategyDisplay,
    TrainingHistoryDisplay,
    TransferClassifier,
    TransferGainDisplay,
    make_feature_pipeline,
)

ROWS = {"image_shape": (8, 8), "image_size": 32}
TINY = CNNFeatureTransformer("tiny", **ROWS)
SHORT = {"layer": "block2", "unfreeze": 1, "head_epochs": 1, "finetune_epochs": 1}

ESTIMATORS = {
    "transformer": CNNFeatureTransformer("tiny", **ROWS),
    "random weights": CNNFeatureTransformer("tiny", weights=None, **ROWS),
    "fine-tuned": FineTunedCNNClassifier("tiny", **SHORT, **ROWS),
    "dropout": FineTunedCNNClassifier(
        "tiny", hidden_units=(8,), dropout=0.5, **SHORT, **ROWS
    ),
    "held out": FineTunedCNNClassifier(
        "tiny", head_init="random", validation_fraction=0.3, **SHORT, **ROWS
    ),
    "pretrained": PretrainedCNNClassifier("tiny", **ROWS),
    "pretrained, learned": PretrainedCNNClassifier("tiny", class_map="learn", **ROWS),
    "advisor": StrategyAdvisor(TINY),
    "advised": TransferClassifier(TINY),
    "extract_early": TransferClassifier(TINY, strategy="extract_early"),
    "extract": TransferClassifier(TINY, strategy="extract"),
}
METHODS = ["transform", "predict", "decision_function", "predict_proba", "report"]


def global_states():
    """Return the states of all generators that a process shares."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    tensors = [torch.get_rng_state(), *cuda]
    return [
        random.getstate(),
        kind,
        keys.tolist(),
        rest,
        *map(torch.Tensor.tolist, tensors),
    ]


@pytest.fixture(scope="module")
def digits():
    rows, labels = load_digits(return_X_y=True)
    return rows[:40] / 16, labels[:40] % 3


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_estimators_leave_global_generators_alone(kind, seed, digits):
    X, y = digits
    estimator = clone(ESTIMATORS[kind]).set_params(random_state=seed)
    before = global_states()

    estimator.fit(X, y)
    for name in METHODS:
        if hasattr(estimator, name):
            getattr(estimator, name)(*([] if name == "report" else [X]))

    assert global_states() == before


@pytest.mark.parametrize("classifier", ["svm", "softmax", "ovr"])
def test_seeded_pipelines_leave_global_generators_alone(classifier, digits):
    pipeline = make_feature_pipeline("tiny", classifier, random_state=0, **ROWS)
    before = global_states()

    pipeline.fit(*digits).predict(digits[0])

    assert global_states() == before


def test_displays_leave_global_generators_alone(digits):
    X, y = digits
    pipeline = make_feature_pipeline("tiny", "softmax", random_state=0, **ROWS)
    pipeline.fit(X, y)
    advisor = StrategyAdvisor(TINY).fit(X, y)
    tuned = FineTunedCNNClassifier("tiny", **SHORT, **ROWS).fit(X, y)
    before = global_states()

    with plt.rc_context({"backend": "agg"}):
        GradCAMDisplay.from_estimator(pipeline, X[:2])
        GradCAMDisplay.from_estimator(tuned, X[:2])
        PredictionGridDisplay.from_estimator(pipeline, X, y, n_images=2)
        LayerScoresDisplay.from_estimator(pipeline, X, y, layers=["stem"], cv=2)
        StrategyDisplay.from_advisor(advisor)
        TrainingHistoryDisplay.from_estimator(tuned)
        TransferGainDisplay.from_estimators(tuned, tuned)
        TransferGainDisplay.from_estimators(pipeline, pipeline, X, y, sizes=[0.5], cv=2)
        FineTunedCNNClassifier.from_pipeline(pipeline)
        plt.close("all")

    assert global_states() == before
