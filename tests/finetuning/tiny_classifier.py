"""A small classifier in float32, for the tests of this folder."""

import io

import torch

from skltl import FineTunedCNNClassifier
from skltl.finetuning._checkpoint import DIGEST_BYTES, MAGIC

# Of a network for images of 32 x 32 pixels that is truncated after its last block.
NETWORK = {"layer": "block3", "image_shape": (8, 8), "image_size": 32}


def classifier(backbone="tiny", **parameters):
    defaults = {
        **NETWORK,
        "unfreeze": 1,
        "head_epochs": 3,
        "finetune_epochs": 2,
        "precision": "float32",
        "random_state": 0,
    }
    return FineTunedCNNClassifier(backbone, **{**defaults, **parameters})


def losses(fitted):
    return [record["loss"] for record in fitted.history_]


def saved_state(path):
    """Return the state in a checkpoint."""
    content = path.read_bytes()[len(MAGIC) + DIGEST_BYTES :]
    return torch.load(io.BytesIO(content), weights_only=True)
