"""Fine-tuning in two stages."""

from skltl.finetuning._classifier import FineTunedCNNClassifier
from skltl.finetuning._conversion import head_of_pipeline, parts_of_pipeline, unwrapped
from skltl.finetuning._data import (
    columns_of,
    decode_crops,
    encode_labels,
    example_weights,
)

__all__ = [
    "FineTunedCNNClassifier",
    "columns_of",
    "decode_crops",
    "encode_labels",
    "example_weights",
    "head_of_pipeline",
    "parts_of_pipeline",
    "unwrapped",
]
