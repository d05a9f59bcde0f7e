"""Classifiers that hold a network."""

from skltl.classifiers._class_activation import class_activation
from skltl.classifiers._class_map import map_by_names
from skltl.classifiers._conversion import unwrapped
from skltl.classifiers._finetuned import FineTunedCNNClassifier
from skltl.classifiers._labels import columns_of, encode_labels
from skltl.classifiers._pretrained import PretrainedCNNClassifier

__all__ = [
    "FineTunedCNNClassifier",
    "PretrainedCNNClassifier",
    "class_activation",
    "columns_of",
    "encode_labels",
    "map_by_names",
    "unwrapped",
]
