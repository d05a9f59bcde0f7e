"""Pipelines with a small, fast network, and the predictions of their exports."""

import numpy as np
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from skltl import Backbone, CNNFeatureTransformer, Preprocessing

# Parameters of a short fit, whose results are the same on all machines.
SHORT = {
    "head_epochs": 1,
    "finetune_epochs": 1,
    "random_state": 0,
    "engine": "torch",
    "precision": "float32",
}


def transformer(**parameters):
    """A transformer whose results are the same on all machines."""
    defaults = {"layer": "block2", "engine": "torch", "precision": "float32"}
    return CNNFeatureTransformer("tiny", **(defaults | parameters))


def pipeline(*steps, **parameters):
    """A pipeline of the transformer and further steps."""
    return make_pipeline(transformer(**parameters), *steps)


class Unusual(nn.Module):
    """A layer that neither format has."""

    def forward(self, batch):
        return torch.special.i0(batch.clamp(-1, 1))


def unusual_transformer():
    """A transformer whose network cannot be exported to a file."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Unusual(), nn.Identity())
    backbone = Backbone.from_module("own", network, preprocessing=Preprocessing(16))
    return CNNFeatureTransformer(backbone, layer="1", engine="torch")


class Doubled(StandardScaler):
    """A scaler whose results are other than those of its class."""

    def transform(self, X, copy=None):
        return 2 * super().transform(X, copy)


def assert_outputs(outputs, estimator, images, classes, tolerance=1e-3):
    """Compare the outputs of an export with the methods of its estimator."""
    outputs = dict(outputs)
    predicted = estimator.predict(images)
    if "values" in outputs:
        limits = {"rtol": tolerance, "atol": tolerance}
        np.testing.assert_allclose(outputs.pop("values"), predicted, **limits)
        assert not outputs
        return
    if "labels" in outputs:
        np.testing.assert_array_equal(outputs.pop("labels"), predicted)
    else:
        np.testing.assert_array_equal(
            np.array(classes)[outputs.pop("index")], predicted
        )
    assert outputs  # scores, probabilities or both
    if "scores" in outputs:
        scores = estimator.decision_function(images)
        atol = tolerance * abs(scores).max()
        np.testing.assert_allclose(outputs.pop("scores"), scores, atol=atol)
    if "probabilities" in outputs:
        proba = estimator.predict_proba(images)
        found = outputs.pop("probabilities")
        np.testing.assert_allclose(found, proba, atol=tolerance)
    assert not outputs
