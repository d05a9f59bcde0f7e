"""Features of frozen networks, as a scikit-learn transformer, and their cache."""

from skltl.features._cache import (
    CacheEntry,
    CacheInfo,
    cache_info,
    clear_cache,
    resolve_folder,
)
from skltl.features._extraction import extract_features
from skltl.features._feature_estimator import FeatureEstimator, NetworkEstimator
from skltl.features._pipeline import make_feature_pipeline
from skltl.features._pooling import POOLINGS, n_pooled, pool
from skltl.features._recipe import Recipe, can_pool
from skltl.features._transformer import CNNFeatureTransformer

__all__ = [
    "POOLINGS",
    "CNNFeatureTransformer",
    "CacheEntry",
    "CacheInfo",
    "FeatureEstimator",
    "NetworkEstimator",
    "Recipe",
    "cache_info",
    "can_pool",
    "clear_cache",
    "extract_features",
    "make_feature_pipeline",
    "n_pooled",
    "pool",
    "resolve_folder",
]
