"""Features stored on disk: the databases, the keys, lookups, and the folder."""

from skltl.cache._folder import cache_info, clear_cache, resolve_folder
from skltl.cache._lookup import CachedFeatures

__all__ = ["CachedFeatures", "cache_info", "clear_cache", "resolve_folder"]
