"""One database of the cache that would rather do nothing than fail."""

from __future__ import annotations

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
from skltl.exceptions import CacheWarning
from skltl.features._database import KEYS_PER_QUERY, DamagedDatabaseError, Database

# What one query may bring into memory.
BYTES_PER_QUERY = 2**26

# Claims are renewed with every batch, which takes a second, or a few. Those of a
# process that was killed hold others up for so long.
CLAIM_SECONDS = 15.0

# How long a process does without a folder that it could not write to, and without a
# file that it waited for in vain.
PAUSE_SECONDS = 300.0

_MOVED = sqlite3.SQLITE_READONLY_DBMOVED
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}

Result = TypeVar("Result")

# Of the process: what was warned of, and what it does without until when.
_warned: set[tuple[Path, str]] = set()
_pauses: dict[Path, float] = {}


class Shelf:
    """A database that is set aside when it is damaged, and done without otherwise.

    A cache saves time; no error of it may cost a result. A process warns of each kind
    of trouble in a folder once.

    Parameters
    ----------
    folder : Path
        Of the cache; it is made if it is not there.
    name : str
        Of the database.
    about, is_durable
        See `Database`.
    """

    def __init__(
        self, folder: Path, name: str, about: str = "", is_durable: bool = True
    ) -> None:
        self._folder = folder
        self._path = folder / f"{name}.sqlite"
        self._about = about
        self._is_durable = is_durable
        self._database: Database | None = None
        self._inode: int | None = None
        self._may_store = True

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()
        self._database = None

    def read(
        self, keys: Sequence[bytes], n_bytes: int
    ) -> Iterator[tuple[bytes, bytes]]:
        """Yield key and value of the rows that are there, intact and of this length."""
        n_keys = max(1, min(KEYS_PER_QUERY, BYTES_PER_QUERY // n_bytes))
        for some in _pieces(keys, n_keys):
            for key, value in self._attempt(_reading(some), _NO_ROWS):
                if len(value) == n_bytes:
                    yield key, value

    def write(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Store rows, if that is possible."""
        if rows and self._is_writable():
            self._attempt(lambda database: database.write(rows), None)

    def claim(self, keys: Sequence[bytes], owner: bytes) -> set[bytes]:
        """Announce that rows are being computed; return those to compute here."""
        granted = set()
        for some in _pieces(keys, KEYS_PER_QUERY):
            granted |= self._claim(some, owner) if self._is_writable() else set(some)
        return granted

    def release(self, keys: Sequence[bytes], owner: bytes) -> None:
        """Withdraw claims."""
        if keys and self._is_writable():
            self._attempt(lambda database: database.release(keys, owner), None)

    def stop_storing(self, why: str) -> None:
        """Only read from now on."""
        self._may_store = False
        self._warn("storing", f"{why} Features are right, but not all are stored.")

    def _claim(self, keys: Sequence[bytes], owner: bytes) -> set[bytes]:
        now = time.time()
        return self._attempt(
            lambda database: database.claim(keys, owner, now, now + CLAIM_SECONDS),
            set(keys),
        )

    def _is_writable(self) -> bool:
        return self._may_store and not _is_paused(self._folder)

    def _attempt(
        self, action: Callable[[Database], Result], otherwise: Result
    ) -> Result:
        """Do something with the database; in vain, return something else instead."""
        for _ in range(2):
            if _is_paused(self._path):
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
                    self._do_without(error)
                    break
        return otherwise

    def _opened(self) -> Database:
        if self._database is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._inode = _inode(self._path)
            self._database = Database(self._path, self._about, self._is_durable)
            self._inode = _inode(self._path)
            with suppress(OSError):
                os.utime(self._path)  # the least recently used ones are deleted first
        return self._database

    def _do_without(self, error: Exception) -> None:
        """Wait no more for a locked file, write no more to a full folder."""
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _LOCKED:
            _pauses[self._path] = time.monotonic() + PAUSE_SECONDS
            why = f"is locked by another program, in {self._path.name!r}."
        else:
            _pauses[self._folder] = time.monotonic() + PAUSE_SECONDS
            why = (
                f"cannot be written ({error}, {self._path.name!r}). Make room, choose "
                "another folder, or ask for the right to write."
            )
        self.stop_storing(why)

    def _set_aside(self, error: DamagedDatabaseError) -> None:
        """Rename a damaged file, so that a new one can be made."""
        aside = Path(f"{self._path}.{uuid.uuid4().hex[:8]}.damaged")
        journal = Path(f"{self._path}-journal")
        try:
            if _inode(self._path) != self._inode:
                return  # another process has just done it
            if journal.exists():  # it would be applied to the new file
                journal.replace(f"{aside}-journal")
            self._path.replace(aside)
            if _inode(aside) != self._inode:  # another one has, after all
                aside.replace(self._path)
                return
        except FileNotFoundError:
            return
        except OSError as why_not:
            self._do_without(why_not)
            return
        self._warn(
            "damage", f"had a damaged file ({error}), set aside as {aside.name}."
        )

    def _warn(self, subject: str, what: str) -> None:
        if (self._folder, subject) not in _warned:
            _warned.add((self._folder, subject))
            warnings.warn(
                f"The cache of features in {str(self._folder)!r} {what}",
                CacheWarning,
                stacklevel=level_of_the_user(),
            )


_NO_ROWS: list[tuple[bytes, bytes]] = []


def _is_paused(path: Path) -> bool:
    return time.monotonic() < _pauses.get(path, 0.0)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _pieces(keys: Sequence[bytes], n: int) -> Iterator[Sequence[bytes]]:
    return (keys[first : first + n] for first in range(0, len(keys), n))


def _reading(keys: Sequence[bytes]) -> Callable[[Database], list[tuple[bytes, bytes]]]:
    return lambda database: database.read(keys)
