"""The pretrained network as a classifier, without training."""

from skltl.pretrained._classifier import PretrainedCNNClassifier, map_by_names

__all__ = [
    "PretrainedCNNClassifier",
    "map_by_names",
]
