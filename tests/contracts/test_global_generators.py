"""No estimator and no display draws from a global generator, seeded or not."""

import random

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from sklearn.base import clone

from skltl import (
    CNNFeatureTransformer,
    FeatureMapDisplay,
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

ROWS = {"image_shape": (8, 8), "image_size": 16}
TRANSFORMER = CNNFeatureTransformer("tiny", **ROWS)
SHORT = {"layer": "block1", "unfreeze": 1, "head_epochs": 1, "finetune_epochs": 1}

ESTIMATORS = {
    "transformer, random weights": CNNFeatureTransformer("tiny", weights=None, **ROWS),
    "fine-tuned, dropout": FineTunedCNNClassifier(
        "tiny", hidden_units=(8,), dropout=0.5, **SHORT, **ROWS
    ),
    "fine-tuned, hold-out": FineTunedCNNClassifier(
        "tiny", head_init="random", validation_fraction=0.3, **SHORT, **ROWS
    ),
    "pretrained": PretrainedCNNClassifier("tiny", **ROWS),
    "pretrained, learned class map": PretrainedCNNClassifier(
        "tiny", class_map="learn", **ROWS
    ),
    "advisor": StrategyAdvisor(TRANSFORMER, cv=2),
    "transfer": TransferClassifier(TRANSFORMER, cv=2),
}
METHODS = ["transform", "predict", "decision_function", "predict_proba"]


def global_states():
    """Return the states of all generators that are shared by the process."""
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
def few_digits(digits):
    rows, labels = digits
    return rows[:24], labels[:24] % 2


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_leave_global_generators_unchanged(name, seed, few_digits):
    X, y = few_digits
    estimator = clone(ESTIMATORS[name]).set_params(random_state=seed)
    before = global_states()

    estimator.fit(X, y)
    for method in METHODS:
        if hasattr(estimator, method):
            getattr(estimator, method)(X)
    if hasattr(estimator, "report"):
        estimator.report()

    assert global_states() == before


# Without a seed, scikit-learn's LinearSVC draws from NumPy's global generator.
@pytest.mark.parametrize("classifier", ["svm", "softmax", "ovr"])
def test_seeded_pipelines_leave_global_generators_unchanged(classifier, few_digits):
    X, y = few_digits
    pipeline = make_feature_pipeline("tiny", classifier, random_state=0, **ROWS)
    before = global_states()

    pipeline.fit(X, y).predict(X)

    assert global_states() == before


def test_displays_leave_global_generators_unchanged(few_digits):
    X, y = few_digits
    pipeline = make_feature_pipeline(
        "tiny", "softmax", layer="block1", random_state=0, **ROWS
    ).fit(X, y)
    advisor = StrategyAdvisor(TRANSFORMER, cv=2).fit(X, y)
    tuned = FineTunedCNNClassifier("tiny", **SHORT, **ROWS).fit(X, y)
    before = global_states()

    with plt.rc_context({"backend": "agg"}):
        GradCAMDisplay.from_estimator(pipeline, X[:2])
        GradCAMDisplay.from_estimator(tuned, X[:2])
        FeatureMapDisplay.from_estimator(pipeline, X, y)
        FeatureMapDisplay.from_estimator(pipeline, X, y, method="tsne")
        PredictionGridDisplay.from_estimator(pipeline, X, y, n_images=2)
        LayerScoresDisplay.from_estimator(pipeline, X, y, layers=["stem"], cv=2)
        StrategyDisplay.from_advisor(advisor)
        TrainingHistoryDisplay.from_estimator(tuned)
        TransferGainDisplay.from_estimators(tuned, tuned)
        TransferGainDisplay.from_estimators(pipeline, pipeline, X, y, sizes=[0.5], cv=2)
        FineTunedCNNClassifier.from_pipeline(pipeline)
        plt.close("all")

    assert global_states() == before
