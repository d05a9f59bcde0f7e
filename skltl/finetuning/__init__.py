"""Fine-tuning in two stages."""

from skltl.finetuning._classifier import FineTunedCNNClassifier
from skltl.finetuning._conversion import (
    head_of_pipeline,
    linear_function_of,
    n_dimensions_of,
    parts_of_pipeline,
    without_names,
)
from skltl.finetuning._data import (
    columns_of,
    encode_indicators,
    encode_labels,
    encode_values,
    example_weights,
)
from skltl.finetuning._estimator import FineTunedCNN
from skltl.finetuning._regressor import FineTunedCNNRegressor

__all__ = [
    "FineTunedCNN",
    "FineTunedCNNClassifier",
    "FineTunedCNNRegressor",
    "columns_of",
    "encode_indicators",
    "encode_labels",
    "encode_values",
    "example_weights",
    "head_of_pipeline",
    "linear_function_of",
    "n_dimensions_of",
    "parts_of_pipeline",
    "without_names",
]
