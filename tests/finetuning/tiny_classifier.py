"""A small classifier in float32, for the tests of this folder."""

import io

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from skltl import FineTunedCNNClassifier, FineTunedCNNRegressor
from skltl.finetuning._checkpoint import DIGEST_BYTES, MAGIC

# Of a network for images of 32 x 32 pixels that is truncated after its last block.
NETWORK = {"layer": "block3", "image_shape": (8, 8), "image_size": 32}


FIT = {
    "unfreeze": 1,
    "head_epochs": 3,
    "finetune_epochs": 2,
    "precision": "float32",
    "random_state": 0,
}


def classifier(backbone="tiny", **parameters):
    return FineTunedCNNClassifier(backbone, **{**NETWORK, **FIT, **parameters})


def regressor(backbone="tiny", **parameters):
    return FineTunedCNNRegressor(backbone, **{**NETWORK, **FIT, **parameters})


def losses(fitted):
    return [record["loss"] for record in fitted.history_]


def saved_state(path):
    """Return the state in a checkpoint."""
    content = path.read_bytes()[len(MAGIC) + DIGEST_BYTES :]
    return torch.load(io.BytesIO(content), weights_only=True)


def standardized_probe(features, y):
    """Fit scikit-learn's scaler and classifier; return them as four tensors."""
    scaler = StandardScaler().fit(features)
    probe = LogisticRegression(C=0.1, max_iter=1000)
    probe.fit(scaler.transform(features), y)
    arrays = (probe.coef_, probe.intercept_, scaler.mean_, scaler.scale_)
    weight, bias, mean, scale = (torch.from_numpy(one).float() for one in arrays)
    return weight.requires_grad_(), bias.requires_grad_(), mean, scale
