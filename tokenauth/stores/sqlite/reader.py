"""Reads on the event loop: a plain connection to the SQLite file.

A look-up by key takes a few microseconds; a thread would cost a hundred times as much. In WAL mode a reader never
waits for a writer.
"""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.dialects import sqlite

from tokenauth.errors import StoreUnavailable
from tokenauth.models import Failures, Instant, Token
from tokenauth.stores.changes.clock import CLOCK
from tokenauth.stores.engine import OnClockAdvance, Query, Rows, Values, ignore_clock
from tokenauth.stores.sqlite import files
from tokenauth.stores.sqlite.transaction import SqliteTransaction
from tokenauth.stores.tables import as_checked_token, checked_columns, marks, revocations, tokens

_TIMEOUT = 0.05
"""Seconds to wait where even SQLite's readers must: while a crashed process's log is recovered."""


def _sql(statement: Select[Any]) -> str:
    """Compile a statement once, with positional parameters."""
    return str(statement.compile(dialect=sqlite.dialect(paramstyle="qmark")))


_TOKEN = _sql(select(*checked_columns).where(tokens.c.digest == ""))
_LEASES = "SELECT * FROM pool_tokens WHERE pool = '' AND value = ''"
_REVOKED = _sql(
    select(revocations.c.seq, revocations.c.digest).where(revocations.c.seq > 0).order_by(revocations.c.seq)
)
_LAST_SEQ = _sql(select(func.max(revocations.c.seq)))
_CLOCK = _sql(select(marks.c.at).where(marks.c.name == ""))


@cache
def _failures(count: int) -> str:
    """Look up one key after the other. With `IN`, SQLite would sort the keys first, which takes twice as long."""
    return f"""
        WITH wanted (key) AS (VALUES {", ".join(["(?)"] * count)})
        SELECT key, count, last_at FROM wanted CROSS JOIN failures USING (key)
    """  # noqa: S608 - constants


_FILES = ("", "-wal", "-shm")
"""Suffixes of the files that SQLite has open while any connection is."""

ERRORS = (sqlite3.Error, MemoryError)
"""What SQLite raises; MemoryError is how the driver reports SQLITE_NOMEM."""


def reason(error: BaseException) -> str:
    """Return SQLite's message. The driver's own messages may quote stored data: of those return only the type."""
    if isinstance(error, MemoryError):
        return "out of memory"
    return str(error) if hasattr(error, "sqlite_errorcode") else type(error).__name__


class Reader:
    """The connection on which the event loop of a process reads, and its feed of revocations.

    All look-ups of tokens and of failed logins in one iteration of the event loop read the same snapshot of the file:
    its locks then cost two system calls an iteration, instead of two a look-up. A request sees what was committed
    before it was received: it is answered in a later iteration, task or not, and by then `_end_snapshot` has run for
    each snapshot that began before. For the same reason, a login sees each failure that its process no longer counts in
    memory: the process stops counting it in a later iteration than the one in which it learns of the commit.
    """

    sees_commits = True

    def __init__(self, path: str, failed: Callable[[str], object]) -> None:
        """`failed` is called with the reason when a read fails."""
        self._path = path
        self._failed = failed
        self._on_clock_advance: OnClockAdvance = ignore_clock
        self._has_snapshot = False

    def open(self, on_clock_advance: OnClockAdvance = ignore_clock) -> Instant:
        """Open the file, which must exist with its schema; return the clock row.

        Raises what SQLite raises, OSError or StoreUnavailable.
        """
        self._on_clock_advance = on_clock_advance
        self._db = sqlite3.connect(files.existing(self._path), timeout=_TIMEOUT, isolation_level=None, uri=True)
        try:
            self._read_state()
            return self.clock_row()
        except BaseException:
            self._db.close()
            raise

    def _read_state(self) -> None:
        self._cursor = self._db.cursor()
        self._cursor.execute("PRAGMA query_only = ON")
        self._transaction = SqliteTransaction(self._db)
        self._version = self._data_version()
        self._seq: int = self._cursor.execute(_LAST_SEQ).fetchone()[0] or 0
        self._files = {suffix: files.identity(self._path + suffix) for suffix in _FILES}  # all are open from here on

    def open_nothing(self) -> None:
        """Make every read raise StoreUnavailable."""
        self._db = sqlite3.connect(":memory:")
        self._cursor = self._db.cursor()
        self._transaction = SqliteTransaction(self._db)
        self._db.close()

    @property
    def identity(self) -> str:
        """The identity of the open file; empty if it was deleted while it was opened."""
        return self._files[""] or ""

    def close(self) -> None:
        self._db.close()
        self._has_snapshot = False

    def rows(self, query: Query, values: Values) -> Rows:
        """Run a query. Raises StoreUnavailable."""
        try:
            return self._transaction.rows(query, values)
        except ERRORS as error:
            raise self._unavailable(error) from error

    def token(self, digest: bytes) -> Token | None:
        """Look up a token. Raises StoreUnavailable."""
        if not self._has_snapshot:
            self._begin_snapshot()
        row = self._one(_TOKEN, bytearray(digest))  # of `bytes`, the driver would first look for an adapter
        return None if row is None else as_checked_token(row)

    def failures(self, keys: Sequence[bytes]) -> Mapping[bytes, Failures]:
        """Look up counts of failed logins with one statement. Raises StoreUnavailable."""
        if not keys:
            return {}
        if not self._has_snapshot:
            self._begin_snapshot()
        try:
            rows = self._cursor.execute(_failures(len(keys)), [*map(bytearray, keys)]).fetchall()  # as in `token`
        except ERRORS as error:
            raise self._unavailable(error) from error
        return {key: Failures(count, last_at) for key, count, last_at in rows}

    def clock_row(self) -> Instant:
        """Return the latest time that any process has written; 0 if none has. Raises StoreUnavailable."""
        row = self._one(_CLOCK, CLOCK)
        return 0.0 if row is None else float(row[0])

    def read_clock(self) -> None:
        """Report the clock row. Raises StoreUnavailable."""
        self._on_clock_advance(self.clock_row())

    def is_current(self) -> bool:
        """Return True: the file has all revocations."""
        return True

    def age(self) -> float:
        """Return 0: the file is read before each answer."""
        return 0.0

    def drain(self) -> Collection[bytes] | None:
        """Return the digests revoked since the last call; None if the log no longer has all of them.

        Costs one PRAGMA (4 microseconds) if nothing was written. Raises StoreUnavailable.
        """
        try:
            self._end_snapshot()
            version = self._data_version()
            if version == self._version:
                return ()
            rows = self._cursor.execute(_REVOKED, (self._seq,)).fetchall()
            self.read_clock()
        except ERRORS as error:
            raise self._unavailable(error) from error
        self._version = version
        if not rows:
            return ()
        complete = rows[0][0] == self._seq + 1
        self._seq = rows[-1][0]
        return [digest for _, digest in rows] if complete else None

    def add(self, digests: Collection[bytes]) -> None:
        """Do nothing: this process reads its own revocations from the file."""

    def invalidate(self) -> None:
        """Do nothing: the file has all revocations."""

    def problem(self) -> str | None:
        """Run the queries of validations and logins; return what is wrong, if anything.

        The digest is random, so this fails as often as look-ups of tokens do.
        """
        try:
            for sql, key in (
                (_TOKEN, (os.urandom(32),)),
                (_LEASES, ()),
                (_failures(1), (b"",)),
                (_LAST_SEQ, ()),
                (_CLOCK, (CLOCK,)),
            ):
                self._cursor.execute(sql, key).fetchone()
        except ERRORS as error:
            return reason(error)
        return None

    def replaced(self) -> str | None:
        """Return which open file is no longer at its path, if any: it was deleted or replaced, or is empty."""
        with suppress(OSError):  # the disk fails: a later check shows whether the files are still there
            if not _has_content(self._path):
                return os.path.basename(self._path)
            for suffix, identity in self._files.items():
                if files.identity(self._path + suffix) != identity:
                    return os.path.basename(self._path) + suffix
        return None

    def _begin_snapshot(self) -> None:
        """Keep what the next query sees until the next iteration of the event loop, or until `drain`."""
        asyncio.get_running_loop().call_soon(self._end_snapshot)
        try:
            self._cursor.execute("BEGIN")
        except ERRORS as error:
            raise self._unavailable(error) from error
        self._has_snapshot = True

    def _end_snapshot(self) -> None:
        if self._has_snapshot:
            self._db.rollback()
            self._has_snapshot = False

    def _data_version(self) -> int:
        return int(self._cursor.execute("PRAGMA data_version").fetchone()[0])

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        self._failed(reason(error))
        return StoreUnavailable()

    def _one(self, sql: str, *key: bytearray | str) -> tuple[Any, ...] | None:
        try:
            row: tuple[Any, ...] | None = self._cursor.execute(sql, key).fetchone()
        except ERRORS as error:
            raise self._unavailable(error) from error
        return row


def _has_content(path: str) -> bool:
    try:
        return os.stat(path).st_size > 0
    except OSError as error:
        if files.leads_elsewhere(error):
            return False
        raise
