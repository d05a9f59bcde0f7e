"""The folder in which features are kept, one database for each fingerprint."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_cache_path

from skltl.features._database import DamagedDatabaseError, Database

# Of all databases together, in units of 10^9 bytes. Average-pooled features of all main
# cut points of ResNet-50 are 16 kB a picture: a million pictures.
LIMIT = 20.0

FEATURES = "skltl-features-"


class CacheEntry(NamedTuple):
    """What is kept of one way to compute features.

    Parameters
    ----------
    backbone, layer, pooling, image_size, batch_size, device, precision
        What an estimator's parameters of these names amounted to.
    depth : int
        How many of the backbone's blocks lie before the cut.
    n_images : int
        Pictures whose features are kept.
    n_bytes : int
        Of the file.
    last_used : datetime
        When features were last read or written, in local time.
    path : Path
        The file.
    """

    backbone: str
    layer: str
    depth: int
    pooling: str | int
    image_size: int
    batch_size: int
    device: str
    precision: str
    n_images: int
    n_bytes: int
    last_used: datetime
    path: Path


class CacheInfo(NamedTuple):
    """What a folder of cached features holds.

    Parameters
    ----------
    folder : Path
        The folder.
    n_bytes : int
        Of all files of the cache.
    max_bytes : int
        What they may grow to.
    entries : list of CacheEntry
        One for each way to compute features, by backbone and depth of the cut.
    """

    folder: Path
    n_bytes: int
    max_bytes: int
    entries: list[CacheEntry]


def cache_info(cache: str | os.PathLike[str] | bool = True) -> CacheInfo:
    """Say what the cache of features holds.

    Parameters
    ----------
    cache : bool, str or path, default=True
        What the `cache` parameter of the estimators takes: a folder, or ``True`` for
        the usual one.

    Returns
    -------
    CacheInfo
        A named tuple (folder, n_bytes, max_bytes, entries). Each entry is one for one
        backbone, cut point, pooling and so on, with `n_images`, `n_bytes` and when it
        was `last_used`; a ``pandas.DataFrame`` of them is a readable table.

    See Also
    --------
    clear_cache : Delete it.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from skltl import CNNFeatureTransformer, cache_info
    >>> pictures = np.random.default_rng(0).random((6, 32, 32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     transformer = CNNFeatureTransformer("tiny", image_size=32, cache=folder)
    ...     features = transformer.fit_transform(pictures)
    ...     for entry in cache_info(folder).entries:
    ...         print(entry.layer, entry.n_images)
    stem 6
    block1 6
    block2 6
    block3 6
    block4 6
    """
    folder = resolve_folder(cache)
    paths = _databases(folder)
    entries = [_entry(path) for path in paths if path.name.startswith(FEATURES)]
    known = [entry for entry in entries if entry is not None]
    return CacheInfo(
        folder, n_bytes(folder), max_bytes(), sorted(known, key=_by_recipe)
    )


def clear_cache(cache: str | os.PathLike[str] | bool = True) -> None:
    """Delete the cache of features.

    Parameters
    ----------
    cache : bool, str or path, default=True
        What the `cache` parameter of the estimators takes: a folder, or ``True`` for
        the usual one. Files in it that are not of the cache are left alone.

    See Also
    --------
    cache_info : What it holds.

    Examples
    --------
    >>> import tempfile
    >>> from skltl import clear_cache
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     clear_cache(folder)
    """
    for path in _files(resolve_folder(cache)):
        _delete(path)


def resolve_folder(cache: str | os.PathLike[str] | bool) -> Path:
    """Return the folder that a `cache` parameter means."""
    if not isinstance(cache, bool):
        return Path(cache).expanduser().absolute()
    own = os.environ.get("SKLTL_CACHE")
    return Path(own).expanduser().absolute() if own else user_cache_path("skltl")


def max_bytes() -> int:
    """Return what the cache may grow to: ``SKLTL_CACHE_LIMIT``, in gigabytes."""
    text = os.environ.get("SKLTL_CACHE_LIMIT", str(LIMIT))
    try:
        return int(float(text) * 1e9)
    except (ValueError, OverflowError):
        raise ValueError(
            f"SKLTL_CACHE_LIMIT={text!r} in the environment must be a number: how many "
            "gigabytes the cache may grow to."
        ) from None


def n_bytes(folder: Path) -> int:
    """Return the size of all files of the cache."""
    sizes = 0
    for path in _files(folder):
        with suppress(OSError):  # another process has just deleted it
            sizes += path.stat().st_size
    return sizes


def drop_oldest(folder: Path, in_use: set[str]) -> bool:
    """Delete databases, the least recently used first, until the limit is kept.

    Returns
    -------
    bool
        Whether it is kept now; those in use are not deleted.
    """
    limit = max_bytes()
    files = _files(folder)
    for path in sorted(files, key=_last_used):
        if n_bytes(folder) <= limit:
            return True
        if path.stem not in in_use:
            _delete(path)
    return n_bytes(folder) <= limit


def _files(folder: Path) -> list[Path]:
    """List the cache's files, journals left out: SQLite looks after those."""
    return [
        path
        for path in sorted(folder.glob("skltl-*.sqlite*"))
        if not path.name.endswith(".sqlite-journal")
    ]


def _databases(folder: Path) -> list[Path]:
    return [path for path in _files(folder) if path.suffix == ".sqlite"]


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _entry(path: Path) -> CacheEntry | None:
    """Look into a database; one that cannot be read is not listed."""
    try:
        stat = path.stat()
        with closing(Database(path)) as database:
            facts, n_images = json.loads(database.about()), database.n_rows()
        used = datetime.fromtimestamp(stat.st_mtime)
        return CacheEntry(
            **facts, n_images=n_images, n_bytes=stat.st_size, last_used=used, path=path
        )
    except (OSError, sqlite3.Error, DamagedDatabaseError, ValueError, TypeError):
        return None


def _by_recipe(entry: CacheEntry) -> tuple[str | int, ...]:
    """Sort the cut points of one network together, in the network's order."""
    recipe = (entry.backbone, entry.image_size, str(entry.pooling), entry.batch_size)
    return (*recipe, entry.device, entry.precision, entry.depth)


def _delete(path: Path) -> None:
    """Delete a file of the cache; a database not before its writers are done."""
    if path.suffix != ".sqlite":
        path.unlink(missing_ok=True)
        return
    try:
        with closing(Database(path)) as database:
            database.delete()
    except (sqlite3.Error, DamagedDatabaseError):
        path.unlink(missing_ok=True)
