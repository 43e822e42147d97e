"""Reads that must not wait: a plain connection to the SQLite file, used on the event loop itself.

A look-up by primary key takes a few microseconds; a thread would cost a hundred times as much. In WAL mode
a reader never waits for a writer.
"""

import os
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.dialects import sqlite

from tokenauth.errors import StoreUnavailable
from tokenauth.models import Failures, Pool, PoolCounts, PoolToken, Token
from tokenauth.stores.changes import pool_rows
from tokenauth.stores.changes import tokens as verbs
from tokenauth.stores.engine import SqliteTransaction
from tokenauth.stores.store import Hear
from tokenauth.stores.tables import (
    as_token,
    marks,
    pool_token_columns,
    pool_tokens,
    revocations,
    token_columns,
    tokens,
)

_PATIENCE = 0.05
"""Seconds to wait where even SQLite's readers must: while a crashed process's log is recovered."""


def _sql(statement: Select[Any]) -> str:
    """Write a statement once, for the plain driver."""
    return str(statement.compile(dialect=sqlite.dialect(paramstyle="qmark")))


_TOKEN = _sql(select(*token_columns).where(tokens.c.digest == ""))
_POOL_TOKEN = _sql(select(*pool_token_columns).where(pool_tokens.c.pool == "", pool_tokens.c.value == ""))
_FAILURES = "SELECT key, count, last_at FROM failures WHERE key IN (%s)"
_REMOVED = _sql(
    select(revocations.c.seq, revocations.c.digest).where(revocations.c.seq > 0).order_by(revocations.c.seq)
)
_LAST_SEQ = _sql(select(func.max(revocations.c.seq)))
_MARK = _sql(select(marks.c.at).where(marks.c.name == ""))

_FILES = ("", "-wal", "-shm")
"""What is appended to the path for the files that SQLite has open, while any connection is."""

ERRORS = (sqlite3.Error, MemoryError)
"""What SQLite raises; MemoryError is how the driver reports SQLITE_NOMEM."""


def reason(error: BaseException) -> str:
    """Return SQLite's message. The driver's own messages may quote what the database holds: then only the type."""
    if isinstance(error, MemoryError):
        return "out of memory"
    return str(error) if hasattr(error, "sqlite_errorcode") else type(error).__name__


class Reader:
    """One worker's read connection, and its feed of revocations."""

    def __init__(self, path: str, hear: Hear, failed: Callable[[str], object]) -> None:
        """Open the file; it must exist, with the schema that this release needs. `failed` gets why a read failed."""
        self._path = path
        self._hear = hear
        self._failed = failed
        self._db = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
        self._cursor = self._db.cursor()
        self._cursor.execute("PRAGMA query_only = ON")
        self._cursor.execute("PRAGMA cache_size = -8000")  # KiB: the upper pages of a file of a million tokens
        self._plain = SqliteTransaction(self._db)
        self._version = self._data_version()
        self._seq: int = self._cursor.execute(_LAST_SEQ).fetchone()[0] or 0
        self._files = {suffix: _identity(path + suffix) for suffix in _FILES}  # this connection has opened them all

    def token(self, digest: bytes) -> Token | None:
        """Look up a token. Raises StoreUnavailable."""
        row = self._one(_TOKEN, digest)
        return None if row is None else as_token(row)

    def pool_token(self, pool: str, value: str) -> PoolToken | None:
        """Look up a token of a pool, live or expired. Raises StoreUnavailable."""
        row = self._one(_POOL_TOKEN, pool, value)
        if row is None:
            return None
        pool, value, free_at, holder, fence, retired, username = row
        return PoolToken(pool, value, free_at, holder, fence, bool(retired), username)

    def pool_counts(self, pool: Pool, now: float) -> PoolCounts:
        """Count the tokens of a pool: 0.1 microseconds for each. Raises StoreUnavailable."""
        try:
            return pool_rows.counts(*self._plain.rows(pool_rows.COUNT, pool_rows.terms(pool, now))[0])
        except ERRORS as error:
            raise self._unavailable(error) from error

    def failures(self, keys: Sequence[bytes]) -> Mapping[bytes, Failures]:
        """Look up what is kept of past logins, with one statement. Raises StoreUnavailable."""
        try:
            rows = self._cursor.execute(_FAILURES % ",".join("?" * len(keys)), keys).fetchall()
        except ERRORS as error:
            raise self._unavailable(error) from error
        return {key: Failures(count, last_at) for key, count, last_at in rows}

    def mark(self, name: str) -> float:
        """Look up a mark; 0 if it was never set. Raises StoreUnavailable."""
        row = self._one(_MARK, name)
        return 0.0 if row is None else float(row[0])

    def news(self) -> Collection[bytes] | None:
        """Return the digests removed since this was last asked; None if the log no longer has them all.

        Costs one PRAGMA (4 microseconds) while nobody writes. Raises StoreUnavailable.
        """
        try:
            version = self._data_version()
            if version == self._version:
                return ()
            rows = self._cursor.execute(_REMOVED, (self._seq,)).fetchall()
            self.listen()
        except ERRORS as error:
            raise self._unavailable(error) from error
        self._version = version
        if not rows:
            return ()
        complete = rows[0][0] == self._seq + 1
        self._seq = rows[-1][0]
        return [digest for _, digest in rows] if complete else None

    def listen(self) -> None:
        """Hear what the latest time is that any worker has written down. Raises StoreUnavailable."""
        self._hear(self.mark(verbs.CLOCK))

    def trouble(self) -> str | None:
        """Read what validations and logins read; return what is wrong, if anything is.

        The digest is random, so this fails as often as the look-ups of tokens do.
        """
        try:
            for sql, key in (
                (_TOKEN, (os.urandom(32),)),
                (_POOL_TOKEN, ("", "")),
                (_FAILURES % "?", (b"",)),
                (_LAST_SEQ, ()),
                (_MARK, (verbs.CLOCK,)),
            ):
                self._cursor.execute(sql, key).fetchone()
        except ERRORS as error:
            return reason(error)
        return None

    def sure(self) -> bool:
        """Say that the file tells everything."""
        return True

    def replaced(self) -> str | None:
        """Return which of the open files is no longer at its path, if any: deleted, replaced, or the database empty."""
        if not _has_content(self._path):
            return os.path.basename(self._path)
        for suffix, identity in self._files.items():
            if _identity(self._path + suffix) != identity:
                return os.path.basename(self._path) + suffix
        return None

    def close(self) -> None:
        """Disconnect."""
        self._db.close()

    def _data_version(self) -> int:
        return int(self._cursor.execute("PRAGMA data_version").fetchone()[0])

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        self._failed(reason(error))
        return StoreUnavailable()

    def _one(self, sql: str, *key: bytes | str) -> tuple[Any, ...] | None:
        try:
            row: tuple[Any, ...] | None = self._cursor.execute(sql, key).fetchone()
        except ERRORS as error:
            raise self._unavailable(error) from error
        return row


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _has_content(path: str) -> bool:
    try:
        return os.stat(path).st_size > 0
    except OSError:
        return False
