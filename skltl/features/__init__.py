"""Features of frozen networks, as a scikit-learn transformer, and their cache."""

from skltl.features._cache import CacheEntry, CacheInfo, cache_info, clear_cache
from skltl.features._pipeline import make_feature_pipeline
from skltl.features._recipe import can_pool
from skltl.features._transformer import CNNFeatureTransformer

__all__ = [
    "CNNFeatureTransformer",
    "CacheEntry",
    "CacheInfo",
    "cache_info",
    "can_pool",
    "clear_cache",
    "make_feature_pipeline",
]
