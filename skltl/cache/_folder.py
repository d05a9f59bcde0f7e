"""The cache folder: its location, contents and limit. One database per fingerprint."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
import warnings
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from platformdirs import user_cache_path

from skltl._caller import user_stacklevel
from skltl.cache._store import (
    NOT_STORED,
    DamagedDatabaseError,
    delete_database,
    inspect_database,
    last_used,
    warn_once,
)
from skltl.exceptions import CacheWarning, quote, shorten

# Default limit of all files together, in GB (10^9 bytes). Average-pooled features at
# all main layers of ResNet-50 take 16 kB per image: the limit is a million images.
DEFAULT_LIMIT = 20.0

# If features that were used within this time are deleted, the limit is too small for
# what the user is working on.
RECENT_HOURS = 24

FEATURES = "skltl-features-"

OWN_FILES = re.compile(
    r"skltl-(features-[0-9a-f]{32}|files-[0-9a-f]{32}|leases|claims)\.sqlite"
    r"(\.[0-9a-f]{8}\.damaged)?(-journal|-wal|-shm)?"
)
COMPANION = re.compile(r"-(journal|wal|shm)$")

# Fields of entries that the table of `CacheInfo` leaves out, and its number of rows.
HIDDEN = ("depth", "batch_size", "device", "preprocessing", "last_used", "path")
N_SHOWN = 20


class CacheEntry(NamedTuple):
    """One way to compute features, and the amount stored; see `cache_info`."""

    backbone: str
    layer: str
    depth: int
    pooling: str | int
    image_size: int
    batch_size: int
    device: str
    precision: str
    engine: str
    preprocessing: str
    network: str
    n_images: int
    n_bytes: int
    last_used: datetime
    path: Path


# The fields that a database describes itself with, and their types.
DESCRIBED: dict[str, type] = {
    **dict.fromkeys(CacheEntry._fields[:11], str),
    **dict.fromkeys(("depth", "image_size", "batch_size"), int),
}

# Errors of files that are not ours. AttributeError, TypeError: JSON of another kind;
# RecursionError: deeply nested lists in JSON; OverflowError: a time of last use that is
# not in the calendar.
NOT_OURS = (
    AttributeError,
    OSError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    sqlite3.Error,
)


class CacheInfo(NamedTuple):
    """Contents of a cache folder; see `cache_info`."""

    folder: Path
    n_bytes: int
    max_bytes: float
    entries: list[CacheEntry]

    def __repr__(self) -> str:
        """Show the first entries as a table."""
        lines = [
            f"Feature cache in {quote(str(self.folder), 120)}: "
            f"{self.n_bytes / 1e6:.1f} MB of {self.max_bytes / 1e6:.1f} MB"
        ]
        if self.entries:
            shown = [name for name in CacheEntry._fields if name not in HIDDEN]
            cells = [shown] + [
                [_cell(getattr(entry, name)) for name in shown]
                for entry in self.entries[:N_SHOWN]
            ]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        if len(self.entries) > N_SHOWN:
            lines.append(f"... and {len(self.entries) - N_SHOWN} more")
        return "\n".join(lines)


def cache_info(cache: str | os.PathLike[str] | bool = True) -> CacheInfo:
    """Describe the contents of a feature cache.

    Parameters
    ----------
    cache : bool, str or path, default=True
        Cache folder, as in the `cache` parameter of the estimators: ``True`` is the
        default folder.

    Returns
    -------
    CacheInfo
        Named tuple that prints as a table, with the fields

        - `folder` (Path);
        - `n_bytes`, the size of all files of the cache, and its limit `max_bytes`;
        - `entries`, a list of named tuples. Each entry stands for one way to compute
          features: `backbone`, `layer`, `pooling`, `image_size`, `batch_size`,
          `device`, `precision` and `engine` are resolved parameters; `depth` is the
          number of blocks up to the layer; `preprocessing` describes resizing, cropping
          and normalization; `network` is the beginning of a digest of the network up to
          the layer, which is equal for equal weights; `n_images` is the number of
          images whose features are stored, `n_bytes` the size of the file `path`, and
          `last_used` the local time of its last use.

        ``pandas.DataFrame(info.entries)`` makes a data frame.

    See Also
    --------
    clear_cache : Delete a feature cache.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from skltl import CNNFeatureTransformer, cache_info
    >>> images = np.random.default_rng(0).random((6, 32, 32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     transformer = CNNFeatureTransformer("tiny", image_size=32, cache=folder)
    ...     features = transformer.fit_transform(images)
    ...     for entry in cache_info(folder).entries:
    ...         print(entry.layer, entry.n_images)
    stem 6
    block1 6
    block2 6
    block3 6
    block4 6
    """
    folder = _required_folder(cache)
    described = (_entry(path) for path in _files(folder) if path.suffix == ".sqlite")
    entries = sorted(filter(None, described), key=_order)
    return CacheInfo(folder, n_bytes(folder), max_bytes(), entries)


def clear_cache(cache: str | os.PathLike[str] | bool = True) -> None:
    """Delete a feature cache.

    Parameters
    ----------
    cache : bool, str or path, default=True
        Cache folder, as in the `cache` parameter of the estimators: ``True`` is the
        default folder. Other files in the folder are kept.

    See Also
    --------
    cache_info : Describe the contents of a feature cache.

    Examples
    --------
    >>> import tempfile
    >>> from skltl import clear_cache
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     clear_cache(folder)
    """
    folder = _required_folder(cache)
    left = [path.name for path in _files(folder) if not _delete(path)]
    if left:
        warnings.warn(
            f"{len(left)} files of the feature cache in {quote(str(folder), 120)} "
            f"could not be deleted: {', '.join(left[:2])}, ... Close other programs "
            "that use them, or check the permissions of the folder.",
            CacheWarning,
            stacklevel=user_stacklevel(),
        )


def resolve_folder(cache: str | os.PathLike[str] | bool | None) -> Path | None:
    """Return the folder that a `cache` parameter stands for, ``None`` for no cache.

    Raises `ValueError` if it is not a valid path.
    """
    name = bool(cache) if isinstance(cache, np.bool_) else cache
    if name is None or name is False:
        return None
    if name is True:
        name = os.environ.get("SKLTL_CACHE") or user_cache_path("skltl")
    try:
        text = os.fspath(name)
        os.fsencode(text)
        if not text or "\0" in text:
            raise ValueError("it is empty or has a null character")
        return Path(text).expanduser().absolute()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise ValueError(
            f"cache={shorten(repr(name), 120)} is not a valid path: "
            f"{shorten(str(error), 120)}."
        ) from error


def max_bytes() -> float:
    """Return the limit of the cache's size, from ``SKLTL_CACHE_LIMIT`` (in GB).

    Raises `ValueError` if that is not a non-negative number.
    """
    text = os.environ.get("SKLTL_CACHE_LIMIT") or str(DEFAULT_LIMIT)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise ValueError(
            f"The environment variable SKLTL_CACHE_LIMIT={quote(text, 120)} "
            "must be a non-negative number: the size limit of the feature cache in "
            "gigabytes ('inf' for no limit)."
        )
    return limit * 1e9


def n_bytes(folder: Path) -> int:
    """Return the size of all files of the cache."""
    size = 0
    for path in _files(folder):
        with suppress(OSError):  # another process has just deleted it
            size += path.lstat().st_size
    return size


def drop_oldest(folder: Path, in_use: set[str]) -> bool:
    """Delete files until the limit holds, and return whether it does.

    Damaged files go first, then the least recently used databases. Databases in use,
    and files of other users, are kept.
    """
    limit = max_bytes()
    reached = f"has reached its limit of {limit / 1e9:g} GB"
    size = n_bytes(folder)
    for path in sorted(_files(folder), key=_order_of_deletion):
        if size <= limit:
            break
        if path.stem not in in_use:
            hours = (time.time() - last_used(path)) / 3600
            entry = _entry(path)  # `None` if these are no features
            if _delete(path) and entry and entry.n_images and hours < RECENT_HOURS:
                warn_once(
                    folder,
                    "deletion",
                    f"{reached}: features used in the last {RECENT_HOURS} hours were "
                    "deleted, and are computed again when needed. To keep all, raise "
                    "SKLTL_CACHE_LIMIT.",
                )
            size = n_bytes(folder)
    if size > limit:
        warn_once(
            folder,
            "limit",
            f"{reached} with the entries in use. Raise SKLTL_CACHE_LIMIT, or call "
            f"skltl.clear_cache. {NOT_STORED}",
        )
    return size <= limit


def _required_folder(cache: str | os.PathLike[str] | bool) -> Path:
    folder = resolve_folder(cache)
    if folder is None:
        raise ValueError(f"cache={cache!r} means no cache. Pass a folder or True.")
    return folder


def _files(folder: Path) -> list[Path]:
    """List the files of the cache, and whatever else has the name of one."""
    try:
        with os.scandir(folder) as items:
            return sorted(
                Path(item.path)
                for item in items
                if OWN_FILES.fullmatch(item.name)
                and not item.is_dir(follow_symlinks=False)
            )
    except OSError:  # it does not exist, or may not be read
        return []


def _order_of_deletion(path: Path) -> tuple[bool, float]:
    return ".damaged" not in path.name, last_used(path)


def _entry(path: Path) -> CacheEntry | None:
    """Return what a database holds, ``None`` if these are not features of ours."""
    try:
        state = path.lstat()
        description, n_images = inspect_database(path)
        fields = json.loads(description)
        types = {name: type(value) for name, value in fields.items()}
        if types not in (DESCRIBED, DESCRIBED | {"pooling": int}):
            return None
        return CacheEntry(
            **fields,
            n_images=n_images,
            n_bytes=state.st_size,
            last_used=datetime.fromtimestamp(state.st_mtime),
            path=path,
        )
    except NOT_OURS:
        return None


def _cell(value: Any) -> str:
    """Format a value for the table: on one line, and not too long."""
    return shorten(str(value).encode("unicode_escape").decode(), 24)


def _order(entry: CacheEntry) -> tuple[str | int, ...]:
    """Sort the layers of one network together, in the network's order."""
    config = (entry.backbone, entry.image_size, str(entry.pooling), entry.batch_size)
    return (*config, entry.device, entry.precision, entry.depth)


def _delete(path: Path) -> bool:
    """Delete a file of the cache, and return whether it is gone.

    A database is deleted between two transactions; its companions are left to SQLite as
    long as it exists. A file that is locked, or that belongs to another user, stays.
    """
    database = COMPANION.sub("", str(path))
    with suppress(OSError, sqlite3.Error):
        if path.suffix == ".sqlite":
            with suppress(DamagedDatabaseError):
                delete_database(path)
        if database == str(path) or not os.path.lexists(database):
            path.unlink(missing_ok=True)
    return not os.path.lexists(path)
