"""One small estimator of each kind, fitted once per session."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from skltl import (
    CNNFeatureTransformer,
    FineTunedCNNClassifier,
    PretrainedCNNClassifier,
    StrategyAdvisor,
    TransferClassifier,
    make_feature_pipeline,
)

SMALL = {"image_size": 16, "random_state": 0}
# A vision transformer of 0.4 million parameters, and no weights.
VIT = {"backbone": "timm:test_vit", "weights": None, "image_size": 32}
LABELS = np.arange(9) % 2


def transform(fitted, X):
    return fitted.transform(X)


def predict_proba(fitted, X):
    return fitted.predict_proba(X)


def decision_function(fitted, X):
    return fitted.decision_function(X)


def layer_scores(fitted, X):
    return np.array(list(fitted.layer_scores_.values()))


def fine_tuned(X, y):
    return FineTunedCNNClassifier(
        "tiny", layer="block2", unfreeze=1, head_epochs=2, finetune_epochs=1, **SMALL
    )


def fine_tuned_vit(X, y):
    return FineTunedCNNClassifier(
        **VIT, pooling="auto", unfreeze=2, head_epochs=2, finetune_epochs=1,
        random_state=0,
    )  # fmt: skip


def fine_tuned_transformer(X, y):
    return fine_tuned(X, y).fit(X, y).to_transformer()


def from_pipeline(X, y):
    pipeline = make_feature_pipeline("tiny", "softmax", layer="block2", **SMALL)
    return FineTunedCNNClassifier.from_pipeline(
        pipeline.fit(X, y), unfreeze=1, finetune_epochs=1, random_state=0
    )


@dataclass(frozen=True)
class Kind:
    """Constructor of an estimator, given training data, and its output for images."""

    make: Callable
    output: Callable


KINDS = {
    "transformer": Kind(
        lambda X, y: CNNFeatureTransformer("tiny", layer=["stem", "block2"], **SMALL),
        transform,
    ),
    "random weights": Kind(
        lambda X, y: CNNFeatureTransformer("tiny", weights=None, **SMALL), transform
    ),
    "vision transformer": Kind(
        lambda X, y: CNNFeatureTransformer(
            **VIT, layer=["blocks.1", "last"], pooling="cls+avg", random_state=0
        ),
        transform,
    ),
    "pretrained": Kind(
        lambda X, y: PretrainedCNNClassifier("tiny", **SMALL), predict_proba
    ),
    "learned class map": Kind(
        lambda X, y: PretrainedCNNClassifier("tiny", class_map="learn", **SMALL),
        predict_proba,
    ),
    "fine-tuned": Kind(fine_tuned, predict_proba),
    "fine-tuned vision transformer": Kind(fine_tuned_vit, predict_proba),
    "fine-tuned transformer": Kind(fine_tuned_transformer, transform),
    "from a pipeline": Kind(from_pipeline, predict_proba),
    "pipeline": Kind(
        lambda X, y: make_feature_pipeline("tiny", layer="block2", **SMALL),
        decision_function,
    ),
    "transfer": Kind(
        lambda X, y: TransferClassifier(
            CNNFeatureTransformer("tiny", **SMALL), strategy="extract", random_state=0
        ),
        predict_proba,
    ),
    "advisor": Kind(
        lambda X, y: StrategyAdvisor(
            CNNFeatureTransformer("tiny", **SMALL), cv=2, random_state=0
        ),
        layer_scores,
    ),
}


@pytest.fixture(scope="session")
def labels():
    """Labels of the nine images, for two classes."""
    return LABELS


@pytest.fixture(params=KINDS)
def kind(request):
    """Each kind of estimator, or those named by an indirect parametrization."""
    return KINDS[request.param]


@pytest.fixture(scope="session")
def fit_once(shared_images):
    """Return a function that returns a copy of a kind's only fitted estimator."""

    @functools.cache
    def fit(kind):
        return kind.make(shared_images, LABELS).fit(shared_images, LABELS)

    return lambda kind: copy.deepcopy(fit(kind))


@pytest.fixture
def fitted(kind, fit_once):
    """A fitted estimator of the kind; the test may change it."""
    return fit_once(kind)
