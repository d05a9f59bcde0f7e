"""The fine-tuning that the tests of this folder look at: small and in float32."""

from skltl import FineTunedCNNClassifier


def classifier(**parameters):
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
    return FineTunedCNNClassifier("tiny", **{**settings, **parameters})


def losses(fitted):
    return [record["loss"] for record in fitted.history_]
