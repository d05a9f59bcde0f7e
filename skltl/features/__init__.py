"""Features of frozen networks, as a scikit-learn transformer."""

from skltl.features._estimators import (
    FeatureEstimator,
    NetworkClassifier,
    n_features_by_layer,
    truncated_backbone,
)
from skltl.features._extraction import (
    cache_folder,
    extract_features,
    extraction_config,
)
from skltl.features._pipeline import make_feature_pipeline
from skltl.features._transformer import (
    CNNFeatureTransformer,
    fitted_parameters,
    transformer_config,
)

__all__ = [
    "CNNFeatureTransformer",
    "FeatureEstimator",
    "NetworkClassifier",
    "cache_folder",
    "extract_features",
    "extraction_config",
    "fitted_parameters",
    "make_feature_pipeline",
    "n_features_by_layer",
    "transformer_config",
    "truncated_backbone",
]
