"""A SQLite file as one side of a copy."""

import asyncio
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from tokenauth.errors import CopyError
from tokenauth.stores import schema
from tokenauth.stores.copying import (
    BATCH,
    CLEAR_TARGET,
    CREATE_STATE,
    DROP_STATE,
    INDEX_NAMES,
    SELECT_INDEXES,
    SELECT_SOURCE,
    SET_REVISION,
    STATE_TABLE,
    TABLES,
    CopiedTable,
    Key,
    Row,
    Side,
    explain_failure,
    explain_not_empty,
    explain_other_copy,
    quoted,
)
from tokenauth.stores.sqlite.files import existing, file_size
from tokenauth.stores.sqlite.reader import ERRORS, reason
from tokenauth.stores.tables import marks

T = TypeVar("T")

_TIMEOUT = 1.0
"""Seconds to wait for a lock: another process may be closing the file."""

_TARGET_PRAGMAS = (
    "synchronous = NORMAL",  # a copy that is interrupted goes on at its last commit that is on the disk
    "cache_size = -256000",  # KiB: a random key is inserted into a page that is in memory
    "wal_autocheckpoint = 16000",  # pages: it writes each of them once
)


_KEEP_INDEXES = (
    f"INSERT INTO {STATE_TABLE} SELECT 'index', sql FROM sqlite_master"  # noqa: S608 - constants
    f" WHERE type = 'index' AND name IN ({INDEX_NAMES})"
)

_NUMBERED = {table.name for table in TABLES if table.table.dialect_options["sqlite"]["autoincrement"]}
"""Tables whose numbers are never given twice. In others a row gets the number after the highest."""


class SqliteSide(Side):
    """The file at an absolute path. Statements run in a thread, one at a time.

    Who has the file open is found by its locks: each connection to a file in WAL mode keeps a shared one, so an
    exclusive one is only granted if there is no other connection, and then no other can be opened.
    """

    unique_numbers = True

    def __init__(self, path: str) -> None:
        """Open nothing yet."""
        self.name = path
        self._db: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1)

    async def open_source(self) -> None:
        await self._run(self._connect)

    async def open_target(self, source: str) -> None:
        await self._run(lambda: self._open_target(source))

    def _open_target(self, source: str) -> None:
        if not self._connect_exclusively():
            raise CopyError(f"{self.name} is in use: {_users(self.name)}; stop the server that uses it")
        for pragma in _TARGET_PRAGMAS:
            self._execute(f"PRAGMA {pragma}")
        [(version,)] = self._execute("SELECT version_num FROM alembic_version").fetchall()
        if version == schema.COPYING:
            [(begun,)] = self._execute(SELECT_SOURCE).fetchall()
            if begun != source:
                raise CopyError(explain_other_copy(self.name, begun))
            return
        if any(self._execute(table.count()).fetchone()[0] for table in TABLES if table.table is not marks):
            raise CopyError(explain_not_empty(self.name))
        with self._transaction():
            self._execute(CREATE_STATE)
            self._execute(f"INSERT INTO {STATE_TABLE} VALUES ('source', ?)", (source,))  # noqa: S608 - constant
            self._execute(_KEEP_INDEXES)
            for statement in CLEAR_TARGET:
                self._execute(statement)
            self._execute(f"{SET_REVISION} ?", (schema.COPYING,))

    async def close(self) -> None:
        await self._run(self._close)
        self._thread.shutdown()

    async def seal(self) -> str | None:
        return await self._run(self._seal)

    def _seal(self) -> str | None:
        if self._connect_exclusively():
            return None
        self._connect()
        return _users(self.name)

    async def find_users(self) -> str | None:
        return None  # nobody can open it

    async def size(self) -> int:
        return file_size(self.name) + file_size(f"{self.name}-wal")

    async def check_room(self, size: int) -> None:
        there = file_size(self.name)
        free = shutil.disk_usage(os.path.dirname(self.name)).free
        if free + there < size:
            raise CopyError(
                f"{self.name}: the copy takes about {_megabytes(size)}, and {_megabytes(free)} are free on that disk;"
                " free some space, or copy to another disk"
            )

    async def count(self, table: CopiedTable) -> int:
        return int((await self._rows(table.count()))[0][0] or 0)

    async def last(self, table: CopiedTable) -> Key | None:
        rows = await self._rows(table.select_last())
        return rows[0] if rows else None

    async def stream(self, table: CopiedTable, after: Key | None) -> AsyncIterator[Sequence[Row]]:
        """Yield rows. Each batch is a query of its own: a long one would keep the -wal file growing."""
        positions = [table.columns.index(name) for name in table.order]
        while batch := await self._page(table, table.order, after, BATCH):
            yield batch
            after = tuple(batch[-1][at] for at in positions)

    async def page(self, table: CopiedTable, after: Key | None, limit: int) -> Sequence[Row]:
        return await self._page(table, table.key, after, limit)

    async def _page(self, table: CopiedTable, by: Sequence[str], after: Key | None, limit: int) -> Sequence[Row]:
        sql = table.select(by, after is not None, True, "?")
        rows = await self._rows(sql, (*(after or ()), limit))
        for at in table.booleans:
            rows = [(*row[:at], bool(row[at]), *row[at + 1 :]) for row in rows]
        return rows

    async def find_new_numbers(self) -> Mapping[bytes, int]:
        return {}

    async def add(self, table: CopiedTable, rows: Sequence[Row]) -> None:
        await self.replace(table, (), rows)

    async def missing_indexes(self) -> Sequence[str]:
        return [str(content) for (content,) in await self._rows(SELECT_INDEXES)]

    async def build_index(self, definition: str) -> None:
        def build() -> None:
            with self._transaction() as db:
                db.execute(definition)
                db.execute(f"DELETE FROM {STATE_TABLE} WHERE content = ?", (definition,))  # noqa: S608 - constant

        await self._run(build)

    async def replace(self, table: CopiedTable, stale: Sequence[Key], rows: Sequence[Row]) -> None:
        await self._run(lambda: self._replace(table, stale, rows))

    def _replace(self, table: CopiedTable, stale: Sequence[Key], rows: Sequence[Row]) -> None:
        which = " AND ".join(f'"{name}" = ?' for name in table.key)
        values = ", ".join("?" * len(table.columns))
        with self._transaction() as db:
            db.executemany(f'DELETE FROM "{table.name}" WHERE {which}', stale)  # noqa: S608 - names
            db.executemany(
                f'INSERT OR REPLACE INTO "{table.name}" ({quoted(table.columns)}) VALUES ({values})',  # noqa: S608
                rows,
            )

    async def sequences(self) -> Mapping[str, int]:
        return {str(name): int(last or 0) for name, last in await self._rows("SELECT name, seq FROM sqlite_sequence")}

    async def finish(self, sequences: Mapping[str, int]) -> None:
        await self._run(lambda: self._finish(sequences))

    def _finish(self, sequences: Mapping[str, int]) -> None:
        self._execute("PRAGMA synchronous = FULL")
        self._execute("PRAGMA fullfsync = ON")
        with self._transaction():
            for name, last in sequences.items():
                if name not in _NUMBERED:
                    continue
                if [*self._execute("SELECT 1 FROM sqlite_sequence WHERE name = ?", (name,))]:
                    self._execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = ?", (last, name))
                else:
                    self._execute("INSERT INTO sqlite_sequence (seq, name) VALUES (?, ?)", (last, name))
            self._execute(DROP_STATE)
            self._execute(f"{SET_REVISION} ?", (schema.HEAD,))
        self._execute("PRAGMA wal_checkpoint(TRUNCATE)")

    async def _rows(self, sql: str, values: Row = ()) -> list[Row]:
        return await self._run(lambda: self._execute(sql, values).fetchall())

    async def _run(self, job: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, job)
        except ERRORS as error:
            raise CopyError(explain_failure(self.name, reason(error))) from None
        except OSError as error:
            raise CopyError(explain_failure(self.name, error.strerror or "it fails")) from None

    def _execute(self, sql: str, values: Row = ()) -> sqlite3.Cursor:
        assert self._db is not None
        return self._db.execute(sql, values)

    def _transaction(self) -> "_Transaction":
        assert self._db is not None
        return _Transaction(self._db)

    def _connect(self) -> None:
        self._close()
        self._db = sqlite3.connect(
            existing(self.name), uri=True, timeout=_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        self._execute("PRAGMA cache_size = -64000")  # KiB

    def _connect_exclusively(self) -> bool:
        """Connect as the only user; return whether that was possible."""
        self._connect()
        self._execute("PRAGMA locking_mode = EXCLUSIVE")
        try:
            self._execute("BEGIN EXCLUSIVE")
            self._execute("COMMIT")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            return False
        return True

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


class _Transaction:
    """A transaction of a connection that begins none itself."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> sqlite3.Connection:
        self._db.execute("BEGIN IMMEDIATE")
        return self._db

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._db.execute("COMMIT")
        else:
            with suppress(*ERRORS):
                self._db.rollback()


def _users(path: str) -> str:
    return f"`fuser -v {path}` shows by which program"


def _megabytes(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"
