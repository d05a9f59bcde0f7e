"""The fine-tuning that the tests of this folder look at: small and in float32."""

import io

import torch

from skltl import FineTunedCNNClassifier
from skltl.finetuning._checkpoint import DIGEST_BYTES, MAGIC


def classifier(backbone="tiny", **parameters):
    settings = {
        "layer": "block3",
        "image_shape": (8, 8),
        "image_size": 32,
        "unfreeze": 1,
        "head_epochs": 3,
        "finetune_epochs": 2,
        "precision": "float32",
        "random_state": 0,
    }
    return FineTunedCNNClassifier(backbone, **{**settings, **parameters})


def losses(fitted):
    return [record["loss"] for record in fitted.history_]


def saved_state(path):
    """Return what a checkpoint holds."""
    content = path.read_bytes()[len(MAGIC) + DIGEST_BYTES :]
    return torch.load(io.BytesIO(content), weights_only=True)
