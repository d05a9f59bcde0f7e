"""Values by key in one SQLite file that processes share, and that may be damaged.

Whatever happens to the file, a value that comes out is one that went in under its key:
each row has a checksum, and one that does not fit counts as not there.

Who can write to the folder can plant files in it. So nothing that one says is done: its
tables must be exactly ours (no view, no trigger), its values no longer than ours, and
neither links nor journals lead out of the folder.

The journal is SQLite's rollback journal, not its write-ahead log (WAL): that one has a
bug before version 3.51.3 that can damage the file, and cannot be read from a folder
without the right to write.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from skltl._locks import Lock

# "sktl" in ASCII: what tells our files from other people's.
APPLICATION_ID = 0x736B746C

SCHEMA = """
CREATE TABLE rows (key BLOB PRIMARY KEY, value BLOB NOT NULL, checksum BLOB NOT NULL);
CREATE TABLE claims (key BLOB PRIMARY KEY, owner BLOB NOT NULL, until REAL NOT NULL);
CREATE TABLE about (text TEXT NOT NULL);
"""

# What SQLite puts beside a database.
COMPANIONS = ("-journal", "-wal", "-shm")

# SQLite's limit of placeholders in a statement was 999 for a long time.
KEYS_PER_QUERY = 500

# Writers hold the file for milliseconds; on a slow network drive, for seconds.
PATIENCE = 10.0

# What one call may take of a processor: ours need less, in any file of ours.
CPU_SECONDS = 10.0
STEPS_BETWEEN_LOOKS = 10_000

# Key, checksum and SQLite's own bytes beside a value, and whatever is no value.
BYTES_BESIDE = 10_000

# Each row takes so many bytes of the file at least.
LEAST_ROW = 16

# How a journal ends that names another file, which SQLite would delete.
NAMES_ANOTHER = bytes.fromhex("d9d505f920a163d7")

_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

# Besides real damage: our statements never change, so tables or columns that they do
# not find (SQLITE_ERROR), rules that they break (SQLITE_CONSTRAINT), values that are
# too long (SQLITE_TOOBIG), or work without end (SQLITE_INTERRUPT) are not ours.
_DAMAGED = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_INTERRUPT,
}

_making = Lock()


class _Gate:
    """Where threads go into SQLite: a fork waits until they are out again.

    SQLite has locks of its own: in the child, those of other threads would stay locked.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Forget, in a child, the threads of the parent."""
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

    def shut(self) -> None:
        """Wait, before a fork, for those inside: not longer than they for a file."""
        with self._changed:
            self._n_forks += 1
            self._changed.wait_for(lambda: self._n_inside <= 0, PATIENCE)

    def open(self) -> None:
        """Let those in that have waited for the fork."""
        with self._changed:
            self._n_forks -= 1
            self._changed.notify_all()


_gate = _Gate()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_gate.shut, after_in_parent=_gate.open, after_in_child=_gate.renew
    )


class DamagedDatabaseError(Exception):
    """The file is no database, a damaged one, or somebody else's."""


class Database:
    """An open file of values by key. Not for use by several threads, or after a fork.

    Parameters
    ----------
    path : Path
        The file; it is made if it is not there.
    n_bytes : int, default=0
        The length of its values; a file with longer ones is not ours.
    about : callable, default=str
        Says what it holds, for people; asked if it is made now.
    is_durable : bool, default=True
        Whether what is written survives a power failure, which costs time. It survives
        the end of the process in any case.

    Raises
    ------
    DamagedDatabaseError
        If the file is there and cannot be used; any method raises it.
    sqlite3.Error, OSError
        If it can neither be made nor read (a full disk, a folder without the right to
        write); any method that writes raises it.
    """

    def __init__(
        self,
        path: Path,
        n_bytes: int = 0,
        about: Callable[[], str] = str,
        is_durable: bool = True,
    ) -> None:
        self.path = path
        _make_file(path)
        # Without the right to write, SQLite opens the file to read only.
        self._connection = _connect(path, "rw", PATIENCE, n_bytes)
        try:
            with _guarded(self._connection, path):
                synchronous = "NORMAL" if is_durable else "OFF"
                self._connection.execute(f"PRAGMA synchronous = {synchronous}")
                self._prepare(about)
                # Somebody may have turned it to WAL.
                self._connection.execute("PRAGMA journal_mode = DELETE")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        _close(self._connection)

    def read(self, keys: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
        """Return key and value of those rows that are there and intact.

        At most ``KEYS_PER_QUERY`` keys can be asked for.
        """
        # A damaged row may have become a number or a text: CAST makes it bytes that do
        # not fit the checksum, and leaves bytes as they are.
        query = (
            "SELECT key, CAST(value AS BLOB), CAST(checksum AS BLOB) FROM rows "
            f"WHERE key IN ({','.join('?' * len(keys))})"
        )
        with _guarded(self._connection, self.path):
            return [
                (key, value)
                for key, value, checksum in self._connection.execute(query, keys)
                if value is not None and checksum == _checksum(key, value)
            ]

    def write(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Store rows, all or none, in place of others with their keys."""
        checked = [(key, value, _checksum(key, value)) for key, value in rows]
        with _guarded(self._connection, self.path), self._transaction():
            self._connection.executemany(
                "INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", checked
            )

    def claim(
        self, keys: Sequence[bytes], owner: bytes, now: float, until: float
    ) -> set[bytes]:
        """Announce that rows are being computed; return those that nobody else claims.

        At most ``KEYS_PER_QUERY`` keys can be claimed. The owner's older claims are
        renewed. Those of a process that was killed end by themselves when their time is
        up, also if its clock was ahead: nobody claims for longer than this, but others
        may have looked at the clock later, while this one waited for the file.
        """
        latest = until + PATIENCE
        with _guarded(self._connection, self.path), self._transaction():
            self._connection.execute(
                "DELETE FROM claims WHERE NOT until BETWEEN ? AND ?", (now, latest)
            )
            self._connection.execute(
                "UPDATE claims SET until = ? WHERE owner = ?", (until, owner)
            )
            self._connection.executemany(
                "INSERT OR IGNORE INTO claims VALUES (?, ?, ?)",
                [(key, owner, until) for key in keys],
            )
            granted = self._connection.execute(
                "SELECT key FROM claims WHERE owner = ? "
                f"AND key IN ({','.join('?' * len(keys))})",
                (owner, *keys),
            ).fetchall()
        return {key for (key,) in granted}

    def release(self, keys: Iterable[bytes], owner: bytes) -> None:
        """Withdraw claims."""
        with _guarded(self._connection, self.path), self._transaction():
            self._connection.executemany(
                "DELETE FROM claims WHERE key = ? AND owner = ?",
                [(key, owner) for key in keys],
            )

    def delete(self) -> None:
        """Delete the file at a moment when no other process writes to it.

        One that has it open finds out when it writes next, and gets an error.
        """
        with _guarded(self._connection, self.path), self._transaction("EXCLUSIVE"):
            self.path.unlink()

    def _prepare(self, about: Callable[[], str]) -> None:
        """Make the tables of a new file, or see that they are ours."""
        if not _is_ours(self._connection):
            # Only one of several processes that come here makes the tables.
            with self._transaction():
                if not _is_ours(self._connection):
                    self._make_tables(about)

    def _make_tables(self, about: Callable[[], str]) -> None:
        if _schema_of(self._connection):
            raise DamagedDatabaseError("it is the database of another program")
        for statement in SCHEMA.split(";"):
            self._connection.execute(statement)
        self._connection.execute("INSERT INTO about VALUES (?)", (about(),))
        self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        self._connection.execute(f"BEGIN {kind}")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def look_into(path: Path) -> tuple[str, int]:
    """Return what a database holds, in words, and how many rows; change nothing.

    Raises
    ------
    DamagedDatabaseError
        If it is no database of ours.
    sqlite3.Error, OSError
        If it cannot be read now.
    """
    # No file has more rows than this, but pages that refer to one another may seem to.
    most = path.stat().st_size // LEAST_ROW
    connection = _connect(path, "ro", patience=1)
    try:
        with _guarded(connection, path):
            if not _is_ours(connection):
                raise DamagedDatabaseError("it is the database of another program")
            texts = connection.execute("SELECT text FROM about LIMIT 2").fetchall()
            (n_rows,) = connection.execute(
                "SELECT count(*) FROM (SELECT 1 FROM rows LIMIT ?)", (most,)
            ).fetchone()
    finally:
        _close(connection)
    if len(texts) != 1 or not isinstance(texts[0][0], bytes):
        raise DamagedDatabaseError("it does not say what it holds")
    return texts[0][0].decode(errors="replace"), int(n_rows)


def _make_file(path: Path) -> None:
    """Make a missing file as the umask says; SQLite would leave the group no rights."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK
    # Closing a file ends the process's locks on it: no other thread may have one yet.
    with _making, suppress(FileExistsError):
        os.close(os.open(path, flags, 0o666))


def _connect(
    path: Path, mode: str, patience: float, n_bytes: int = 0
) -> sqlite3.Connection:
    """Open a file that is there."""
    _refuse_what_leads_out(path, ("", *COMPANIONS))
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    with _gate:
        connection = sqlite3.connect(uri, patience, isolation_level=None, uri=True)
        connection.text_factory = bytes  # damaged text need not be text
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, n_bytes + BYTES_BESIDE)
    return connection


def _close(connection: sqlite3.Connection) -> None:
    with _gate:
        connection.close()


@contextmanager
def _guarded(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Tell damage, after which a file is of no use, from other errors; end in time."""
    end = time.thread_time() + CPU_SECONDS
    connection.set_progress_handler(
        lambda: time.thread_time() > end, STEPS_BETWEEN_LOOKS
    )
    _refuse_what_leads_out(path, ("", "-journal"))
    try:
        with _gate:
            yield
    except UnicodeDecodeError as error:
        # SQLite's message has a damaged name in it, which Python cannot read.
        raise DamagedDatabaseError("its tables are damaged") from error
    except sqlite3.DatabaseError as error:
        # Errors of Python's own module have no code.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            raise DamagedDatabaseError(str(error)) from error
        raise


def _refuse_what_leads_out(path: Path, suffixes: Iterable[str]) -> None:
    """Refuse a file by which SQLite would make, change or delete one elsewhere."""
    for suffix in suffixes:
        name = f"{path}{suffix}"
        try:
            # Not `Path.lstat`: this is done before each call.
            mode = os.lstat(name).st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(mode):
            raise DamagedDatabaseError("it is a link, or no regular file")
        if suffix == "-journal" and _names_another(name):
            raise DamagedDatabaseError("its journal names another file")


def _names_another(journal: str) -> bool:
    """Tell whether a journal says that another file is to be deleted with it.

    SQLite writes such a name for a transaction on several databases; ours have one.
    """
    try:
        with open(os.open(journal, os.O_RDONLY | _NO_LINK), "rb") as file:  # noqa: PTH123
            file.seek(-len(NAMES_ANOTHER), os.SEEK_END)
            return file.read() == NAMES_ANOTHER
    except OSError:  # too short, or gone
        return False


def _is_ours(connection: sqlite3.Connection) -> bool:
    """Tell whether a file has our tables and nothing else."""
    connection.execute("PRAGMA trusted_schema = OFF")
    (marker,) = connection.execute("PRAGMA application_id").fetchone()
    return bool(marker == APPLICATION_ID and _schema_of(connection) == _our_schema())


def _schema_of(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """Return what tables, indexes, views and triggers a file has, up to a dozen."""
    query = "SELECT type, name, tbl_name, sql FROM sqlite_master LIMIT 12"
    return sorted(connection.execute(query).fetchall(), key=repr)


@lru_cache
def _our_schema() -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.text_factory = bytes
        connection.executescript(SCHEMA)
        return _schema_of(connection)


def _checksum(key: bytes, value: bytes) -> bytes:
    return blake2b(value, key=key, digest_size=8).digest()
