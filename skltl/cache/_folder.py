"""The folder in which features are kept, one database for each fingerprint."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
import warnings
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from platformdirs import user_cache_path

from skltl._caller import level_of_the_user
from skltl.cache._database import COMPANIONS, DamagedDatabaseError, Database, look_into
from skltl.cache._store import last_changed, shortened
from skltl.exceptions import CacheWarning

# Of all databases together, in units of 10^9 bytes. Average-pooled features of all main
# cut points of ResNet-50 are 16 kB an image: a million images.
LIMIT = 20.0

FEATURES = "skltl-features-"

OWN_FILES = re.compile(
    r"skltl-(features-[0-9a-f]{32}|files-[0-9a-f]{32}|claims)\.sqlite"
    r"(\.[0-9a-f]{8}\.damaged)?(-journal|-wal|-shm)?"
)

# What `CacheInfo` does not show of its entries, and how many it shows.
HIDDEN = ("depth", "batch_size", "device", "preprocessing", "last_used", "path")
N_SHOWN = 20


class CacheEntry(NamedTuple):
    """What is kept of one way to compute features.

    Parameters
    ----------
    backbone, layer, pooling, image_size, batch_size, device, precision, engine
        What an estimator's parameters of these names amounted to.
    depth : int
        How many of the backbone's blocks lie before the cut.
    preprocessing : str
        How images are resized, cropped and normalised.
    network : str
        The first digits of a digest of the network up to the cut, its weights included:
        equal digests mean the same weights, whatever file or seed they came from.
    n_images : int
        Images whose features are kept.
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
    engine: str
    preprocessing: str
    network: str
    n_images: int
    n_bytes: int
    last_used: datetime
    path: Path


# What a database says of itself: texts, but for these.
FACTS = CacheEntry._fields[:11]
NUMBERS = ("depth", "image_size", "batch_size")

# What comes of a file that says other things. RecursionError: lists in lists in lists;
# OverflowError: a year that no calendar has.
NOT_OURS = (
    DamagedDatabaseError,
    OSError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    sqlite3.Error,
)


class CacheInfo(NamedTuple):
    """What a folder of cached features holds.

    Printed, it is a short table; ``pandas.DataFrame(info.entries)`` has all of it.

    Parameters
    ----------
    folder : Path
        The folder.
    n_bytes : int
        Of all files of the cache.
    max_bytes : float
        What they may grow to.
    entries : list of CacheEntry
        One for each way to compute features, by backbone and depth of the cut.
    """

    folder: Path
    n_bytes: int
    max_bytes: float
    entries: list[CacheEntry]

    def __repr__(self) -> str:
        """Show the first entries as a table."""
        lines = [
            f"Cache of features in {shortened(repr(str(self.folder)))}: "
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
    """Say what the cache of features holds.

    Parameters
    ----------
    cache : bool, str or path, default=True
        What the `cache` parameter of the estimators takes: a folder, or ``True`` for
        the usual one.

    Returns
    -------
    CacheInfo
        A named tuple (folder, n_bytes, max_bytes, entries) that prints as a table. Each
        entry is one for one network, cut point, pooling and so on, with `n_images`,
        `n_bytes` and when it was `last_used`. All of them with all that is known:
        ``pandas.DataFrame(cache_info().entries)``.

    See Also
    --------
    clear_cache : Delete it.

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
    folder = _named_folder(cache)
    entries = [_entry(path) for path in _files(folder) if path.suffix == ".sqlite"]
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
    folder = _named_folder(cache)
    left = [path.name for path in _files(folder) if not _delete(path)]
    if left:
        warnings.warn(
            f"Of the cache of features in {shortened(repr(str(folder)))} {len(left)} "
            f"files could not be deleted: {', '.join(left[:2])}, ... Another program "
            "may be using them, or the right to write is missing.",
            CacheWarning,
            stacklevel=level_of_the_user(),
        )


def resolve_folder(cache: str | os.PathLike[str] | bool | None) -> Path | None:
    """Return the folder that a `cache` parameter means, ``None`` for no cache.

    Raises
    ------
    ValueError
        If it cannot be a folder's name.
    """
    if cache is None or (isinstance(cache, (bool, np.bool_)) and not cache):
        return None
    own = os.environ.get("SKLTL_CACHE")
    if isinstance(cache, (bool, np.bool_)) and not own:
        return user_cache_path("skltl")
    name = own if isinstance(cache, (bool, np.bool_)) else cache
    try:
        text = os.fspath(name)  # type: ignore[arg-type]
        os.fsencode(text)
        if not text or "\0" in text:
            raise ValueError("it is empty, or has a null character")
        return Path(text).expanduser().absolute()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise ValueError(
            f"cache={shortened(repr(name))} names no folder: {shortened(str(error))}."
        ) from error


def max_bytes() -> float:
    """Return what the cache may grow to: ``SKLTL_CACHE_LIMIT``, in gigabytes.

    Raises
    ------
    ValueError
        If that is no number from 0 on.
    """
    text = os.environ.get("SKLTL_CACHE_LIMIT") or str(LIMIT)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise ValueError(
            f"SKLTL_CACHE_LIMIT={shortened(repr(text))} in the environment must be a "
            "number from 0 on: how many gigabytes the cache may grow to ('inf' for no "
            "limit)."
        )
    return limit * 1e9


def n_bytes(folder: Path) -> int:
    """Return the size of all files of the cache."""
    sizes = 0
    for path in _files(folder):
        with suppress(OSError):  # another process has just deleted it
            sizes += path.lstat().st_size
    return sizes


def drop_oldest(folder: Path, in_use: set[str]) -> bool:
    """Delete databases until the limit is kept.

    Damaged ones go first, then the least recently used.

    Returns
    -------
    bool
        Whether it is kept now. Those in use, and those of other users, stay.
    """
    limit = max_bytes()
    for path in sorted(_files(folder), key=_by_use):
        if n_bytes(folder) <= limit:
            return True
        if path.stem not in in_use:
            _delete(path)
    return n_bytes(folder) <= limit


def _named_folder(cache: str | os.PathLike[str] | bool) -> Path:
    folder = resolve_folder(cache)
    if folder is None:
        raise ValueError(
            f"cache={cache!r} means no cache. Name a folder, or pass True."
        )
    return folder


def _files(folder: Path) -> list[Path]:
    """List the cache's files, and whatever else has the name of one."""
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if OWN_FILES.fullmatch(path.name) and not _is_folder(path)
        )
    except OSError:  # not made yet, or not to be read
        return []


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:  # another process has just deleted it
        return False


def _by_use(path: Path) -> tuple[bool, float]:
    return ".damaged" not in path.name, last_changed(path)


def _entry(path: Path) -> CacheEntry | None:
    """Look into a database; one that holds no features we know of is not listed."""
    try:
        state = path.lstat()
        about, n_images = look_into(path)
        facts = _checked(json.loads(about))
        used = datetime.fromtimestamp(state.st_mtime)
        return CacheEntry(
            **facts,
            n_images=n_images,
            n_bytes=state.st_size,
            last_used=used,
            path=path,
        )
    except NOT_OURS:
        return None


def _checked(facts: Any) -> dict[str, Any]:
    """Return what a database says of itself, if it says that as ours do."""
    if not isinstance(facts, dict) or facts.keys() != set(FACTS):
        raise ValueError("other facts")
    for name, value in facts.items():
        kinds: tuple[type, ...] = (int,) if name in NUMBERS else (str,)
        if type(value) not in (kinds if name != "pooling" else (str, int)):
            raise ValueError(f"{name} of another type")
    return facts


def _cell(value: Any) -> str:
    """Return a value for a table, on one line and not too long."""
    text = str(value).encode("unicode_escape").decode()
    return shortened(text, 24)


def _by_recipe(entry: CacheEntry) -> tuple[str | int, ...]:
    """Sort the cut points of one network together, in the network's order."""
    recipe = (entry.backbone, entry.image_size, str(entry.pooling), entry.batch_size)
    return (*recipe, entry.device, entry.precision, entry.depth)


def _delete(path: Path) -> bool:
    """Delete a file of the cache, a database between two transactions.

    Returns whether it is gone now: one that is locked, or not ours to delete, stays.
    What SQLite has put beside a database that is there, it looks after itself.
    """
    try:
        if path.suffix == ".sqlite":
            with suppress(DamagedDatabaseError), closing(Database(path)) as database:
                database.delete()
        if not _belongs_to_another(path):
            path.unlink(missing_ok=True)
    except (OSError, sqlite3.Error):
        return False
    return not os.path.lexists(path)


def _belongs_to_another(path: Path) -> bool:
    """Tell whether a file is a journal or the like, of a database that is there."""
    names = (path.name.removesuffix(suffix) for suffix in COMPANIONS)
    return any(
        name != path.name and os.path.lexists(path.with_name(name)) for name in names
    )
