"""Values by key in one SQLite file that processes share, and that may be damaged.

Whatever happens to the file, a value that comes out is one that went in under its key:
each row has a checksum, and one that does not fit counts as not there. Nothing in the
file is ever executed. The journal is SQLite's rollback journal, not its write-ahead log
(WAL): that one has a bug before version 3.51.3 that can damage the file, and cannot be
read from a folder without the right to write.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from hashlib import blake2b
from pathlib import Path

# "sktl" in ASCII: what tells our files from other people's.
APPLICATION_ID = 0x736B746C

SCHEMA = """
CREATE TABLE rows (key BLOB PRIMARY KEY, value BLOB NOT NULL, checksum BLOB NOT NULL);
CREATE TABLE claims (key BLOB PRIMARY KEY, owner BLOB NOT NULL, until REAL NOT NULL);
CREATE TABLE about (text TEXT NOT NULL);
"""

# SQLite's limit of placeholders in a statement was 999 for a long time.
KEYS_PER_QUERY = 500

# Writers hold the file for milliseconds; on a slow network drive, for seconds.
PATIENCE = 10.0

# Besides real damage: our statements never change, so tables or columns that they do
# not find (SQLITE_ERROR), or rules that they break (SQLITE_CONSTRAINT), are not ours.
_DAMAGED = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CONSTRAINT,
}


class DamagedDatabaseError(Exception):
    """The file is no database, a damaged one, or somebody else's."""


class Database:
    """An open file of values by key. Not for use by several threads, or after a fork.

    Parameters
    ----------
    path : Path
        The file; it is made if it is not there.
    about : str, default=""
        What it holds, for people, if it is made now.
    is_durable : bool, default=True
        Whether what is written survives a power failure, which costs time. It survives
        the end of the process in any case.

    Raises
    ------
    DamagedDatabaseError
        If the file is there and cannot be used; any method raises it.
    sqlite3.Error
        If it can neither be made nor read (a full disk, a folder without the right to
        write); any method that writes raises it.
    """

    def __init__(self, path: Path, about: str = "", is_durable: bool = True) -> None:
        self.path = path
        # Without the right to write, SQLite opens the file to read only.
        self._connection = sqlite3.connect(path, PATIENCE, isolation_level=None)
        try:
            with _naming_damage():
                synchronous = "NORMAL" if is_durable else "OFF"
                self._connection.execute(f"PRAGMA synchronous = {synchronous}")
                self._prepare(about)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

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
        with _naming_damage():
            return [
                (key, value)
                for key, value, checksum in self._connection.execute(query, keys)
                if value is not None and checksum == _checksum(key, value)
            ]

    def write(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Store rows, all or none, in place of others with their keys."""
        checked = [(key, value, _checksum(key, value)) for key, value in rows]
        with self._transaction():
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
        with self._transaction():
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
        with self._transaction():
            self._connection.executemany(
                "DELETE FROM claims WHERE key = ? AND owner = ?",
                [(key, owner) for key in keys],
            )

    def delete(self) -> None:
        """Delete the file at a moment when no other process writes to it.

        One that has it open finds out when it writes next, and gets an error.
        """
        with self._transaction("EXCLUSIVE"):
            self.path.unlink()

    def _prepare(self, about: str) -> None:
        """Make the tables of a new file, or see that they are ours."""
        (marker,) = self._connection.execute("PRAGMA application_id").fetchone()
        if marker != APPLICATION_ID:
            # Only one of several processes that come here makes the tables.
            with self._transaction():
                (marker,) = self._connection.execute("PRAGMA application_id").fetchone()
                if marker != APPLICATION_ID:
                    self._make_tables(about)

    def _make_tables(self, about: str) -> None:
        tables = self._connection.execute("SELECT count(*) FROM sqlite_master")
        if tables.fetchone() != (0,):
            raise DamagedDatabaseError("it is the database of another program")
        for statement in SCHEMA.split(";"):
            self._connection.execute(statement)
        self._connection.execute("INSERT INTO about VALUES (?)", (about,))
        self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        with _naming_damage():
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
    sqlite3.Error
        If it is no database of ours, or cannot be read now.
    """
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, timeout=1, uri=True)) as connection:
        (about,) = connection.execute("SELECT max(text) FROM about").fetchone()
        (n_rows,) = connection.execute("SELECT count(*) FROM rows").fetchone()
    return str(about), int(n_rows)


@contextmanager
def _naming_damage() -> Iterator[None]:
    """Tell damage, after which a file is of no use, from other errors."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        # Errors of Python's own module have no code.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            raise DamagedDatabaseError(str(error)) from error
        raise


def _checksum(key: bytes, value: bytes) -> bytes:
    return blake2b(value, key=key, digest_size=8).digest()
