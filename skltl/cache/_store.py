"""Values by key in SQLite files that processes share and that may get damaged.

Whatever happens to a file, a value that is read was written under its key: each entry
has a checksum, and an entry that does not match it counts as missing. A cache saves
time, so none of its errors may cost a result: a damaged file is replaced, and a file
that cannot be used is ignored, with one warning.

Whoever can write to the folder can replace its files by malicious ones. Therefore
nothing in a file is executed: its tables must be exactly ours (no view, no trigger),
its values are limited in length, and neither links nor journals may lead out of it.

SQLite's rollback journal is used instead of its write-ahead log (WAL), which has a bug
before version 3.51.3 that can damage files, and cannot be read in a read-only folder.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from skltl._caller import user_stacklevel
from skltl.exceptions import CacheWarning, quote, shorten

Entry = tuple[bytes, bytes]  # key and value
Item = TypeVar("Item")
Result = TypeVar("Result")

SCHEMA = (
    """CREATE TABLE entries
    (key BLOB PRIMARY KEY, value BLOB NOT NULL, checksum BLOB NOT NULL)""",
    """CREATE TABLE leases
    (key BLOB PRIMARY KEY, owner BLOB NOT NULL, expires REAL NOT NULL)""",
    "CREATE TABLE about (text TEXT NOT NULL)",
)

# The files that SQLite creates beside a database.
COMPANIONS = ("-journal", "-wal", "-shm")

# SQLite's limit of placeholders in a statement was 999 for a long time.
KEYS_PER_QUERY = 500
BYTES_PER_QUERY = 2**26

# Writers lock a file for milliseconds; on a slow network drive, for seconds.
LOCK_SECONDS = 10.0

# Limit on one call's processor time, which only a malicious file can reach.
CPU_SECONDS = 10.0
STEPS_BETWEEN_CHECKS = 10_000

# Bytes beside a value: its key, its checksum and SQLite's own; and all other texts.
BYTES_BESIDE = 10_000

# End of a journal that names another file, which SQLite would delete.
NAMES_ANOTHER_FILE = bytes.fromhex("d9d505f920a163d7")

# Leases are renewed with every chunk of images, which takes a few seconds at most as a
# rule. The images of a process that was killed are left to the others after this time.
LEASE_SECONDS = 15.0

# How long a process ignores a file that it could not read, write or lock.
PAUSE_SECONDS = 300.0

# End of warnings after which nothing is written.
NOT_STORED = "Features are correct, but not all of them are stored."

# Number of damaged files of each name that are kept for inspection.
DAMAGED_KEPT = 2

_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_MOVED = sqlite3.SQLITE_READONLY_DBMOVED
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
_FULL_ERRNO = {errno.ENOSPC, errno.EDQUOT}

# Our statements are constant. So besides real damage, unknown tables or columns
# (SQLITE_ERROR), violated constraints, values that are too long (SQLITE_TOOBIG) and
# endless work (SQLITE_INTERRUPT) mean that the file is not ours.
_DAMAGED = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_INTERRUPT,
}

# State of this process: warnings given, by folder and cause; times until which a file
# is not used, or a file or folder not written to; and connections inherited by a fork,
# which must not be closed, since that could end a transaction of the parent.
_warned: set[tuple[Path, str]] = set()
_unused: dict[Path, float] = {}
_unwritten: dict[Path, float] = {}
_inherited: list[sqlite3.Connection] = []


class _ForkGate:
    """Context of the calls of SQLite: a fork waits until no thread is in one.

    SQLite has internal locks, which a forked child would inherit locked if another
    thread held them. Threads do not wait for one another.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Forget, in a child, the threads of its parent."""
        self._changed = threading.Condition()
        self._n_inside = 0
        self._n_forks = 0

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._n_forks == 0)
            self._n_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._n_inside -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Wait for the threads inside, not longer than these may wait for a file."""
        with self._changed:
            self._n_forks += 1
            self._changed.wait_for(lambda: self._n_inside <= 0, LOCK_SECONDS)

    def open(self) -> None:
        """Admit the threads that have waited for the fork."""
        with self._changed:
            self._n_forks -= 1
            self._changed.notify_all()


_fork_gate = _ForkGate()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_fork_gate.close,
        after_in_parent=_fork_gate.open,
        after_in_child=_fork_gate.renew,
    )


class DamagedDatabaseError(sqlite3.DatabaseError):
    """The file is not a database, is damaged, or belongs to another program."""


class Store:
    """Values by key in one file of a cache folder, without errors of its own.

    While the file cannot be used, nothing is found in it and nothing is written to it.
    The same holds in a forked child for a store that its parent has opened.
    """

    # Writes wait for the disk, to survive a power failure, and the user is told when
    # they are impossible. The end of the process they survive in any case.
    is_durable = True

    def __init__(
        self,
        folder: Path,
        name: str,
        n_value_bytes: int = 0,
        describe: Callable[[], str] = str,
    ) -> None:
        self.name = name
        self.may_write = True  # until an error, or the limit of the folder
        self._folder = folder
        self._path = folder / f"{name}.sqlite"
        self._n_value_bytes = n_value_bytes
        self._describe = describe
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self._process = os.getpid()

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            if os.getpid() != self._process:
                _inherited.append(self._connection)
            else:
                _close(self._connection)
        self._connection = None

    def read(self, keys: Sequence[bytes]) -> Iterator[Entry]:
        """Yield key and value of the entries that exist and are intact."""
        n_that_fit = BYTES_PER_QUERY // max(1, self._n_value_bytes)
        for chunk in chunks(keys, max(1, min(KEYS_PER_QUERY, n_that_fit))):
            for key, value in self._attempt(_unused, _select, chunk) or []:
                if len(value) == self._n_value_bytes:
                    yield key, value

    def write(self, entries: Sequence[Entry]) -> None:
        """Store entries, all or none, replacing those with the same keys."""
        if entries and self._is_writable():
            self._attempt(_unwritten, _insert, entries)

    def _attempt(
        self,
        pauses: dict[Path, float],
        action: Callable[..., Result],
        *arguments: object,
    ) -> Result | None:
        """Return the result of an action, or ``None`` if the file has an error.

        An error pauses the use of the file, or only writing to it.
        """
        for _ in range(2):
            if os.getpid() != self._process or _is_paused(_unused, self._path):
                break
            try:
                connection = self._open()
                with _guarded(connection, self._path):
                    return action(connection, *arguments)
            except DamagedDatabaseError as error:
                self.close()
                self._set_aside(error)
            except (sqlite3.Error, OSError) as error:
                self.close()
                # If another process has deleted the file, a new one is created.
                if getattr(error, "sqlite_errorcode", 0) != _MOVED:
                    self._pause(error, pauses)
                    break
            except BaseException:
                self.close()  # it may be half prepared
                raise
        return None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            _create_file(self._path)
            self._inode = self._path.lstat().st_ino
            # Without write permission, SQLite opens the file for reading.
            self._connection = _connect(
                self._path, "rw", LOCK_SECONDS, self._n_value_bytes
            )
            with _guarded(self._connection, self._path):
                synchronous = "NORMAL" if self.is_durable else "OFF"
                self._connection.execute(f"PRAGMA synchronous = {synchronous}")
                if not _is_ours(self._connection):
                    _create_tables(self._connection, self._describe())
                # Another program may have switched it to WAL.
                self._connection.execute("PRAGMA journal_mode = DELETE")
            with suppress(OSError):
                os.utime(self._path)  # the least recently used files are deleted first
        return self._connection

    def _is_writable(self) -> bool:
        return self.may_write and not _is_paused(_unwritten, self._folder, self._path)

    def _pause(self, error: Exception, pauses: dict[Path, float]) -> None:
        """Ignore the file for a while, or write no more to it, or to the folder."""
        until = time.monotonic() + PAUSE_SECONDS
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        is_full = code in _FULL or getattr(error, "errno", None) in _FULL_ERRNO
        if is_full:
            _unwritten[self._folder] = until
        if code in _LOCKED:
            _unused[self._path] = until
            cause = "lock"
            what = f"has a file locked by another program, {self._path.name!r}."
        else:
            if not is_full or pauses is _unused:
                pauses[self._path] = until
            cause = "space" if is_full else "access"
            what = (
                f"cannot be used ({shorten(str(error), 120)}, {self._path.name!r}). "
                "Free some space, choose another folder, or check its permissions."
            )
        self.may_write = False
        if is_full or self.is_durable:
            warn_once(self._folder, cause, f"{what} {NOT_STORED}")

    def _set_aside(self, error: DamagedDatabaseError) -> None:
        """Rename a damaged file, so that a new one can be created."""
        aside = f"{self._path}.{uuid.uuid4().hex[:8]}.damaged"
        try:
            if self._path.lstat().st_ino != self._inode:
                return  # another process has just done it
            # First the companions, which SQLite would apply to the new file.
            for suffix in (*COMPANIONS, ""):
                with suppress(FileNotFoundError):
                    Path(f"{self._path}{suffix}").replace(f"{aside}{suffix}")
            if Path(aside).lstat().st_ino != self._inode:
                Path(aside).replace(self._path)  # another process was faster, after all
                return
        except FileNotFoundError:
            return
        except OSError as why_not:
            self._pause(why_not, _unused)
            return
        older = sorted(self._folder.glob(f"{self._path.name}.*.damaged"), key=last_used)
        for path in older[:-DAMAGED_KEPT]:
            for suffix in ("", *COMPANIONS):
                with suppress(OSError):
                    Path(f"{path}{suffix}").unlink()
        warn_once(
            self._folder,
            "damage",
            f"had a damaged file ({shorten(str(error), 120)}), renamed to "
            f"{Path(aside).name!r}.",
        )


class Leases(Store):
    """Keys that extractions have reserved, so that each is computed once.

    A lease ends when it is released or expires. Where leases cannot be stored, every
    key is granted, and concurrent extractions compute the same.
    """

    is_durable = False

    def __init__(self, folder: Path, work: str) -> None:
        """Open the leases on keys for one kind of work, named by a text."""
        super().__init__(folder, "skltl-leases")
        self._prefix = blake2b(work.encode(), digest_size=16).digest()
        self._owner = uuid.uuid4().bytes
        self._held: set[bytes] = set()

    def acquire(self, keys: Iterable[bytes]) -> set[bytes]:
        """Return the keys that no other owner holds; renew the leases held before."""
        granted = {self._prefix + key for key in keys}
        for chunk in chunks(list(granted), KEYS_PER_QUERY):
            if self._is_writable():
                held = self._attempt(_unwritten, _lease, chunk, self._owner)
                if held is not None:
                    self._held |= held
                    granted -= set(chunk) - held
        return {key.removeprefix(self._prefix) for key in granted}

    def release(self, keys: Iterable[bytes] | None = None) -> None:
        """End leases, by default all of this owner.

        A full disk does not permit it. Then the file is deleted, with all leases in it:
        other extractions would wait for features that cannot be stored.
        """
        ended = self._held
        if keys is not None:
            ended = self._held & {self._prefix + key for key in keys}
        self._held = self._held - ended
        if ended and not _is_paused(_unwritten, self._path):
            is_released = self._attempt(_unwritten, _release, ended, self._owner)
            if not is_released and _is_paused(_unwritten, self._folder):
                self._attempt(_unwritten, _delete_file, self._path)
                self.close()


def warn_once(folder: Path, cause: str, what: str) -> None:
    """Warn about a cache folder, once for each cause."""
    if (folder, cause) not in _warned:
        _warned.add((folder, cause))
        warnings.warn(
            f"The feature cache in {quote(str(folder), 140)} {what}",
            CacheWarning,
            stacklevel=user_stacklevel(),
        )


def inspect_database(path: Path) -> tuple[bytes, int]:
    """Return the description and the number of entries of a database, unchanged.

    Raises `ValueError` if it has no description, `DamagedDatabaseError` if it is not
    ours, `sqlite3.Error` or `OSError` if it cannot be read now.
    """
    # No file has more entries, but pages that refer to one another may pretend so.
    n_most = path.stat().st_size
    with _connected(path, "ro", timeout=1) as connection:
        if not _is_ours(connection):
            raise DamagedDatabaseError("it belongs to another program")
        about = connection.execute("SELECT text FROM about LIMIT 2")
        ((description,),) = about.fetchall()
        (n_entries,) = connection.execute(
            "SELECT count(*) FROM (SELECT 1 FROM entries LIMIT ?)", (n_most,)
        ).fetchone()
    return description, n_entries


def delete_database(path: Path) -> None:
    """Delete a database while no other process writes to it.

    A process that has it open gets an error when it writes next.
    """
    with _connected(path, "rw", LOCK_SECONDS) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")  # SQLite deletes a WAL
        _delete_file(connection, path)


def last_used(path: Path) -> float:
    """Return the time when a database was last used, or another file written."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _select(connection: sqlite3.Connection, keys: Sequence[bytes]) -> list[Entry]:
    query = f"SELECT * FROM entries WHERE key IN {_placeholders(keys)}"
    return [
        (key, value)
        for key, value, checksum in connection.execute(query, keys)
        # A damaged value may have become a number.
        if isinstance(value, bytes) and checksum == _checksum(key, value)
    ]


def _insert(connection: sqlite3.Connection, entries: Sequence[Entry]) -> None:
    checked = [(key, value, _checksum(key, value)) for key, value in entries]
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            "INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", checked
        )


def _lease(
    connection: sqlite3.Connection, keys: Sequence[bytes], owner: bytes
) -> set[bytes]:
    """Reserve keys that are free, and return all that the owner holds of them.

    Leases that end later than any of ours could are from a clock that is ahead, and are
    deleted like expired ones; others may have read their clock later than this process,
    which then waited for the file.
    """
    now = time.time()
    expires = now + LEASE_SECONDS
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(
            "DELETE FROM leases WHERE NOT expires BETWEEN ? AND ?",
            (now, expires + LOCK_SECONDS),
        )
        connection.execute(
            "UPDATE leases SET expires = ? WHERE owner = ?", (expires, owner)
        )
        connection.executemany(
            "INSERT OR IGNORE INTO leases VALUES (?, ?, ?)",
            [(key, owner, expires) for key in keys],
        )
        granted = connection.execute(
            f"SELECT key FROM leases WHERE owner = ? AND key IN {_placeholders(keys)}",
            (owner, *keys),
        ).fetchall()
    return {key for (key,) in granted}


def _release(
    connection: sqlite3.Connection, keys: Iterable[bytes], owner: bytes
) -> bool:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            "DELETE FROM leases WHERE key = ? AND owner = ?",
            [(key, owner) for key in keys],
        )
    return True


def _delete_file(connection: sqlite3.Connection, path: Path) -> None:
    with connection:
        connection.execute("BEGIN EXCLUSIVE")
        path.unlink()


def _placeholders(keys: Sequence[bytes]) -> str:
    return f"({','.join('?' * len(keys))})"


def _checksum(key: bytes, value: bytes) -> bytes:
    return blake2b(value, key=key, digest_size=8).digest()


def _create_file(path: Path) -> None:
    """Create a missing file with the umask's permissions; SQLite would ignore it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK
    # Closing a file ends the locks of the whole process on it, so no other thread may
    # have locked it yet.
    with _fork_gate, suppress(FileExistsError):
        os.close(os.open(path, flags, 0o666))


def _create_tables(connection: sqlite3.Connection, description: str) -> None:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        if _is_ours(connection):
            return  # another process was faster
        if _schema_of(connection):
            raise DamagedDatabaseError("it belongs to another program")
        for statement in SCHEMA:
            connection.execute(statement)
        connection.execute("INSERT INTO about VALUES (?)", (description,))


def _connect(
    path: Path, mode: str, timeout: float, n_value_bytes: int = 0
) -> sqlite3.Connection:
    """Connect to a file that exists."""
    _refuse_links(path)
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    with _fork_gate:
        connection = sqlite3.connect(uri, timeout, isolation_level=None, uri=True)
        connection.text_factory = bytes  # damaged text need not be valid
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, n_value_bytes + BYTES_BESIDE)
    return connection


@contextmanager
def _connected(path: Path, mode: str, timeout: float) -> Iterator[sqlite3.Connection]:
    """Connect to a file for one use."""
    connection = _connect(path, mode, timeout)
    try:
        with _guarded(connection, path):
            yield connection
    finally:
        _close(connection)


def _close(connection: sqlite3.Connection) -> None:
    with _fork_gate:
        connection.close()


@contextmanager
def _guarded(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Limit the time of what is done, and distinguish damage from other errors."""
    end = time.thread_time() + CPU_SECONDS
    connection.set_progress_handler(
        lambda: time.thread_time() > end, STEPS_BETWEEN_CHECKS
    )
    _refuse_links(path)
    try:
        with _fork_gate:
            yield
    except UnicodeDecodeError as error:
        # SQLite's message quotes a damaged name, which Python cannot decode.
        raise DamagedDatabaseError("its tables are damaged") from error
    except sqlite3.DatabaseError as error:
        # Errors of Python's own module have no code.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            raise DamagedDatabaseError(str(error)) from error
        raise


def _refuse_links(path: Path) -> None:
    """Refuse files by which SQLite would create, change or delete others elsewhere."""
    for suffix in ("", *COMPANIONS):
        name = f"{path}{suffix}"
        try:
            # Not `Path.lstat`, which is slower: this runs before each call.
            mode = os.lstat(name).st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(mode):
            raise DamagedDatabaseError("it is a link or not a regular file")
        if suffix == "-journal" and _names_another_file(name):
            raise DamagedDatabaseError("its journal names another file")


def _names_another_file(journal: str) -> bool:
    """Return whether SQLite would delete another file together with a journal.

    It writes such a name for transactions on several databases; ours have one.
    """
    try:
        with open(os.open(journal, os.O_RDONLY | _NO_LINK), "rb") as file:  # noqa: PTH123
            file.seek(-len(NAMES_ANOTHER_FILE), os.SEEK_END)
            return file.read() == NAMES_ANOTHER_FILE
    except OSError:  # too short, or deleted meanwhile
        return False


def _is_ours(connection: sqlite3.Connection) -> bool:
    """Return whether a file has our tables and nothing else."""
    connection.execute("PRAGMA trusted_schema = OFF")
    return _schema_of(connection) == [(statement.encode(),) for statement in SCHEMA]


def _schema_of(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """Return the statements by which SQLite creates what is in a file, up to a dozen.

    Besides these, a file has only the indexes of primary keys, without a statement.
    """
    query = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 12"
    return connection.execute(query).fetchall()


def _is_paused(pauses: dict[Path, float], *paths: Path) -> bool:
    return any(time.monotonic() < pauses.get(path, 0.0) for path in paths)


def chunks(items: Sequence[Item], n: int) -> Iterator[Sequence[Item]]:
    """Yield the items in groups of `n`."""
    return (items[start : start + n] for start in range(0, len(items), n))
