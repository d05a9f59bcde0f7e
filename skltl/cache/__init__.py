"""Features kept on disk: the store, its keys, lookups, and the folder."""

from skltl.cache._folder import (
    CacheEntry,
    CacheInfo,
    cache_info,
    clear_cache,
    resolve_folder,
)
from skltl.cache._lookup import CacheSession, NoCache

__all__ = [
    "CacheEntry",
    "CacheInfo",
    "CacheSession",
    "NoCache",
    "cache_info",
    "clear_cache",
    "resolve_folder",
]
