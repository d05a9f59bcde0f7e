"""Features of frozen networks, as a scikit-learn transformer."""

from skltl.features._pipeline import make_feature_pipeline
from skltl.features._transformer import CNNFeatureTransformer

__all__ = ["CNNFeatureTransformer", "make_feature_pipeline"]
