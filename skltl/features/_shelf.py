"""One database of the cache that would rather do nothing than fail."""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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

_MOVED = sqlite3.SQLITE_READONLY_DBMOVED

Result = TypeVar("Result")

_warned: set[tuple[Path, str]] = set()


class Shelf:
    """A database that is set aside when it is damaged, and done without otherwise.

    A cache saves time; no error of it may cost a result. A process warns once of each
    damaged file, and once for a folder in which not all can be stored.

    Parameters
    ----------
    folder : Path
        Of the cache; it is made if it is not there.
    name : str
        Of the database.
    about, is_durable
        See `Database`.

    Attributes
    ----------
    is_writable : bool
        Whether all that was to be written has been so far.
    """

    def __init__(
        self, folder: Path, name: str, about: str = "", is_durable: bool = True
    ) -> None:
        self._folder = folder
        self._path = folder / f"{name}.sqlite"
        self._about = about
        self._is_durable = is_durable
        self._database: Database | None = None
        self.is_writable = True
        self._inode = 0

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
        for first in range(0, len(keys), n_keys):
            nothing: list[tuple[bytes, bytes]] = []
            some = keys[first : first + n_keys]
            for key, value in self._attempt(_reading(some), nothing):
                if len(value) == n_bytes:
                    yield key, value

    def write(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Store rows, if that is possible."""
        if rows and self.is_writable:
            self._attempt(lambda database: database.write(rows), None)

    def claim(self, keys: Sequence[bytes], owner: bytes) -> set[bytes]:
        """Announce that rows are being computed; return those to compute here."""
        if not self.is_writable or not keys:
            return set(keys)
        now = time.time()
        return self._attempt(
            lambda database: database.claim(keys, owner, now, now + CLAIM_SECONDS),
            set(keys),
        )

    def release(self, keys: Sequence[bytes], owner: bytes) -> None:
        """Withdraw claims."""
        if keys and self.is_writable:
            self._attempt(lambda database: database.release(keys, owner), None)

    def delete(self) -> None:
        """Delete the file, which works on a full disk, too."""
        self._attempt(lambda database: database.delete(), None)
        self.close()

    def stop_storing(self, why: str) -> None:
        """Only read from now on."""
        self.is_writable = False
        self._warn("storing", f"{why}: not all features are stored")

    def _attempt(
        self, action: Callable[[Database], Result], otherwise: Result
    ) -> Result:
        """Do something with the database; in vain, return something else instead."""
        for _ in range(2):
            try:
                return action(self._opened())
            except DamagedDatabaseError as error:
                self.close()
                self._set_aside(error)
            except (sqlite3.Error, OSError) as error:
                self.close()
                # Another process has deleted the file: begin a new one.
                if getattr(error, "sqlite_errorcode", 0) != _MOVED:
                    self.stop_storing(f"cannot be used as it should ({error})")
                    break
        return otherwise

    def _opened(self) -> Database:
        if self._database is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                self._path.touch()  # the least recently used ones are deleted first
            except OSError:
                if not self._path.exists():
                    raise
            self._inode = self._path.stat().st_ino
            self._database = Database(self._path, self._about, self._is_durable)
        return self._database

    def _set_aside(self, error: DamagedDatabaseError) -> None:
        """Rename a damaged file, so that a new one can be made."""
        aside = Path(f"{self._path}.damaged")
        journal = Path(f"{self._path}-journal")
        try:
            if self._path.stat().st_ino != self._inode:
                return  # another process has just done it
            if journal.exists():  # it would be applied to the new file
                journal.replace(f"{aside}-journal")
            self._path.replace(aside)
            what = f"had a damaged file ({error}), set aside as {aside.name!r}"
            self._warn(self._path.name, what)
        except FileNotFoundError:
            return  # another process has just done it
        except OSError:
            self.stop_storing(f"has a damaged file that cannot be set aside ({error})")

    def _warn(self, subject: str, what: str) -> None:
        if (self._folder, subject) not in _warned:
            _warned.add((self._folder, subject))
            warnings.warn(
                f"The cache of features in {str(self._folder)!r} {what}.",
                CacheWarning,
                stacklevel=level_of_the_user(),
            )


def _reading(keys: Sequence[bytes]) -> Callable[[Database], list[tuple[bytes, bytes]]]:
    return lambda database: database.read(keys)
