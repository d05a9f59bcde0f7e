"""One database of the cache that would rather do nothing than fail."""

from __future__ import annotations

import errno
import os
import sqlite3
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from skltl._caller import level_of_the_user
from skltl.cache._database import (
    COMPANIONS,
    KEYS_PER_QUERY,
    DamagedDatabaseError,
    Database,
)
from skltl.exceptions import CacheWarning

# What one query may bring into memory.
BYTES_PER_QUERY = 2**26

# Claims are renewed with every batch, which takes a second, or a few. Those of a
# process that was killed hold others up for so long.
CLAIM_SECONDS = 15.0

# How long a process does without what it could not read, write, or wait for.
PAUSE_SECONDS = 300.0

# Of each database so many damaged ones are kept, for who wants to know what happened.
DAMAGED_KEPT = 2

_MOVED = sqlite3.SQLITE_READONLY_DBMOVED
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
_FULL_ERRNO = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}

Result = TypeVar("Result")

# Of the process: what was warned of, which files it does without until when, and which
# files and folders it does not write to until when.
_warned: set[tuple[Path, str]] = set()
_unused: dict[Path, float] = {}
_unwritten: dict[Path, float] = {}

# Connections that a forked child must not close: that could end a transaction of its
# parent.
_inherited: list[Database] = []


class Shelf:
    """A database that is set aside when it is damaged, and done without otherwise.

    A cache saves time; no error of it may cost a result. A process warns of each kind
    of trouble in a folder once. In a forked child, a shelf of the parent is empty and
    takes nothing.

    Parameters
    ----------
    folder : Path
        Of the cache; it is made if it is not there.
    name : str
        Of the database.
    n_bytes : int, default=0
        The length of each of its values.
    about, is_durable
        See `Database`.
    is_missed : bool, default=True
        Whether the user is told when the file cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        n_bytes: int = 0,
        about: Callable[[], str] = str,
        is_durable: bool = True,
        is_missed: bool = True,
    ) -> None:
        self._folder = folder
        self._path = folder / f"{name}.sqlite"
        self._n_bytes = n_bytes
        self._about = about
        self._is_durable = is_durable
        self._is_missed = is_missed
        self._database: Database | None = None
        self._inode: int | None = None
        self._may_store = True
        self._process = os.getpid()

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            if self._is_inherited():
                _inherited.append(self._database)
            else:
                self._database.close()
        self._database = None

    def read(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Yield key and value of the rows that are there and intact."""
        n_keys = max(1, min(KEYS_PER_QUERY, BYTES_PER_QUERY // self._n_bytes))
        for some in _pieces(keys, n_keys):
            for key, value in self._attempt(_reading(some), _NO_ROWS, _unused):
                if len(value) == self._n_bytes:
                    yield key, value

    def write(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Store rows, if that is possible."""
        if rows and self._is_writable():
            self._attempt(lambda database: database.write(rows), None, _unwritten)

    def claim(self, keys: Sequence[bytes], owner: bytes) -> set[bytes] | None:
        """Announce that rows are being computed; return those to compute here.

        ``None`` means all: nothing can be announced.
        """
        granted: set[bytes] = set()
        for some in _pieces(keys, KEYS_PER_QUERY):
            found = self._claim(some, owner) if self._is_writable() else None
            if found is None:
                self.release(list(granted), owner)
                return None
            granted |= found
        return granted

    def release(self, keys: Sequence[bytes], owner: bytes) -> None:
        """Withdraw claims.

        A full disk takes no changes either. Then the file goes, with the claims of all:
        others would wait for rows that cannot be stored.
        """
        if not keys or _is_paused(_unwritten, self._path):
            return
        is_done = self._attempt(_releasing(keys, owner), False, _unwritten)
        if not is_done and _is_paused(_unwritten, self._folder):
            self._attempt(lambda database: database.delete(), None, _unwritten)
            self.close()

    def stop_storing(self, why: str) -> None:
        """Only read from now on."""
        self._may_store = False
        self._warn("storing", f"{why} Features are right, but not all are stored.")

    def _claim(self, keys: Sequence[bytes], owner: bytes) -> set[bytes] | None:
        now = time.time()
        return self._attempt(
            lambda database: database.claim(keys, owner, now, now + CLAIM_SECONDS),
            None,
            _unwritten,
        )

    def _is_writable(self) -> bool:
        return self._may_store and not any(
            _is_paused(_unwritten, path) for path in (self._folder, self._path)
        )

    def _is_inherited(self) -> bool:
        return os.getpid() != self._process

    def _attempt(
        self,
        action: Callable[[Database], Result],
        otherwise: Result,
        pauses: dict[Path, float],
    ) -> Result:
        """Do something with the database; in vain, return something else instead.

        An error pauses the use of the file, or only writing to it.
        """
        for _ in range(2):
            if self._is_inherited() or _is_paused(_unused, self._path):
                break
            try:
                return action(self._opened())
            except DamagedDatabaseError as error:
                self.close()
                self._set_aside(error)
            except (sqlite3.Error, OSError) as error:
                self.close()
                # Another process has deleted the file: begin a new one.
                if getattr(error, "sqlite_errorcode", 0) != _MOVED:
                    self._do_without(error, pauses)
                    break
        return otherwise

    def _opened(self) -> Database:
        if self._database is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._inode = _inode(self._path)
            self._database = Database(
                self._path, self._n_bytes, self._about, self._is_durable
            )
            self._inode = _inode(self._path)
            with suppress(OSError):
                os.utime(self._path)  # the least recently used ones are deleted first
        return self._database

    def _do_without(self, error: Exception, pauses: dict[Path, float]) -> None:
        """Use a file no more for a while, or write no more to it, or to the folder."""
        until = time.monotonic() + PAUSE_SECONDS
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        is_full = code in _FULL or getattr(error, "errno", None) in _FULL_ERRNO
        if is_full:
            _unwritten[self._folder] = until
        if code in _LOCKED:
            _unused[self._path] = until
            why = f"is locked by another program, in {self._path.name!r}."
        else:
            if not is_full or pauses is _unused:
                pauses[self._path] = until
            why = (
                f"cannot be written ({shortened(str(error))}, {self._path.name!r}). "
                "Make room, choose another folder, or ask for the right to write."
            )
        self._may_store = False
        if is_full or self._is_missed:
            self.stop_storing(why)

    def _set_aside(self, error: DamagedDatabaseError) -> None:
        """Rename a damaged file, so that a new one can be made."""
        aside = Path(f"{self._path}.{uuid.uuid4().hex[:8]}.damaged")
        try:
            if _inode(self._path) != self._inode:
                return  # another process has just done it
            for suffix in COMPANIONS:  # they would be applied to the new file
                with suppress(FileNotFoundError):
                    Path(f"{self._path}{suffix}").replace(f"{aside}{suffix}")
            self._path.replace(aside)
            if _inode(aside) != self._inode:  # another one has, after all
                aside.replace(self._path)
                return
        except FileNotFoundError:
            return
        except OSError as why_not:
            self._do_without(why_not, _unused)
            return
        self._drop_older_damage()
        self._warn(
            "damage",
            f"had a damaged file ({shortened(str(error))}), set aside as {aside.name}.",
        )

    def _drop_older_damage(self) -> None:
        """Keep the last damaged files only: damage may come again and again."""
        found = self._folder.glob(f"{self._path.name}.*.damaged")
        for old in sorted(found, key=last_changed)[:-DAMAGED_KEPT]:
            for suffix in ("", *COMPANIONS):
                with suppress(OSError):
                    Path(f"{old}{suffix}").unlink()

    def _warn(self, subject: str, what: str) -> None:
        if (self._folder, subject) not in _warned:
            _warned.add((self._folder, subject))
            name = shortened(repr(str(self._folder)), 140)
            warnings.warn(
                f"The cache of features in {name} {what}",
                CacheWarning,
                stacklevel=level_of_the_user(),
            )


_NO_ROWS: list[tuple[bytes, bytes]] = []


def shortened(text: str, n_most: int = 120) -> str:
    """Return a text for a message, without its middle if it is long."""
    half = n_most // 2 - 3
    return text if len(text) <= n_most else f"{text[:half]} ... {text[-half:]}"


def last_changed(path: Path) -> float:
    """Return when a file was written, or last used if it is a database."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _is_paused(pauses: dict[Path, float], path: Path) -> bool:
    return time.monotonic() < pauses.get(path, 0.0)


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return None


def _pieces(keys: Sequence[bytes], n: int) -> Iterator[Sequence[bytes]]:
    return (keys[first : first + n] for first in range(0, len(keys), n))


def _reading(keys: Sequence[bytes]) -> Callable[[Database], list[tuple[bytes, bytes]]]:
    return lambda database: database.read(keys)


def _releasing(keys: Sequence[bytes], owner: bytes) -> Callable[[Database], bool]:
    def release(database: Database) -> bool:
        database.release(keys, owner)
        return True

    return release
