"""Features of frozen networks, as a scikit-learn transformer."""

from skltl.features._estimators import (
    FeatureEstimator,
    HeadEstimator,
    NetworkClassifier,
    n_features_by_layer,
    no_features,
    output_layout,
    poolable_layers,
)
from skltl.features._extraction import (
    cache_folder,
    check_readable,
    extract_features,
    extraction_config,
)
from skltl.features._image_sets import ImageSetTransformer
from skltl.features._linear import (
    LEAST_SCALE,
    FeatureScaler,
    LinearSVC,
    LogisticRegression,
    Ridge,
)
from skltl.features._pipeline import make_feature_pipeline
from skltl.features._transformer import (
    SHARED_PARAMETERS,
    CNNFeatureTransformer,
    check_output,
    copy_fitted_network,
    fitted_parameters,
    fitted_transformer,
    resolve_transformer,
    transformer_config,
)

__all__ = [
    "LEAST_SCALE",
    "SHARED_PARAMETERS",
    "CNNFeatureTransformer",
    "FeatureEstimator",
    "FeatureScaler",
    "HeadEstimator",
    "ImageSetTransformer",
    "LinearSVC",
    "LogisticRegression",
    "NetworkClassifier",
    "Ridge",
    "cache_folder",
    "check_output",
    "check_readable",
    "copy_fitted_network",
    "extract_features",
    "extraction_config",
    "fitted_parameters",
    "fitted_transformer",
    "make_feature_pipeline",
    "n_features_by_layer",
    "no_features",
    "output_layout",
    "poolable_layers",
    "resolve_transformer",
    "transformer_config",
]
