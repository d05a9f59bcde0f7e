"""Features of frozen networks, as a scikit-learn transformer."""

from skltl.features._estimators import FeatureEstimator, NetworkEstimator
from skltl.features._extraction import extract_features
from skltl.features._pipeline import make_feature_pipeline
from skltl.features._transformer import CNNFeatureTransformer

__all__ = [
    "CNNFeatureTransformer",
    "FeatureEstimator",
    "NetworkEstimator",
    "extract_features",
    "make_feature_pipeline",
]
