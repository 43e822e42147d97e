"""A SQLite file as one side of a copy."""

import asyncio
import os
import re
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from tokenauth.errors import CopyError
from tokenauth.stores.copying import BATCH, TABLES, CopiedTable, Key, Row, Side, Value, quoted
from tokenauth.stores.sqlite.files import existing, file_size
from tokenauth.stores.sqlite.reader import ERRORS, reason

T = TypeVar("T")

_TIMEOUT = 1.0
"""Seconds to wait for a lock: another process may be closing the file."""

_TARGET_PRAGMAS = (
    "synchronous = NORMAL",  # a copy that is interrupted goes on at its last commit that is on the disk
    "cache_size = -256000",  # KiB: a random key is inserted into a page that is in memory
    "wal_autocheckpoint = 16000",  # pages: it writes each of them once
)


_PARAMETER = re.compile(r"\$\d+")

_NUMBERED = {table.name for table in TABLES if table.table.dialect_options["sqlite"]["autoincrement"]}
"""Tables whose numbers are never given twice. In others a row gets the number after the highest."""


class SqliteSide(Side):
    """The file at an absolute path. Statements run in a thread, one at a time.

    Who has the file open is found by its locks: each connection to a file in WAL mode keeps a shared one, so an
    exclusive one is only granted if there is no other connection, and then no other can be opened.
    """

    unique_numbers = True
    collation = ""
    indexes = "sql FROM sqlite_master WHERE type = 'index' AND name"
    sequences_query = "SELECT name, seq FROM sqlite_sequence"

    def __init__(self, path: str) -> None:
        """Open nothing yet."""
        super().__init__(path)
        self._db: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1)

    async def open_source(self) -> None:
        await self._run(self._connect)

    async def open_alone(self) -> str | None:
        users = await self.seal()
        for pragma in _TARGET_PRAGMAS if users is None else ():
            await self.fetch(f"PRAGMA {pragma}")
        return users

    async def close(self) -> None:
        await self._run(self._close)
        self._thread.shutdown()

    async def seal(self) -> str | None:
        return await self._run(self._seal)

    def _seal(self) -> str | None:
        if self._connect_exclusively():
            return None
        self._connect()
        return "another program has it open"

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

    async def fetch(self, sql: str, *values: Value) -> Sequence[Row]:
        return await self._run(lambda: self._execute(sql, values).fetchall())

    async def run_each(self, sql: str, each: Sequence[Row]) -> None:
        await self._run(lambda: self._connection.executemany(_PARAMETER.sub("?", sql), each))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        await self.fetch("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with suppress(CopyError):
                await self.fetch("ROLLBACK")
            raise
        await self.fetch("COMMIT")

    async def stream(self, table: CopiedTable, after: Key | None) -> AsyncIterator[Sequence[Row]]:
        """Yield rows. Each batch is a query of its own: a long one would keep the -wal file growing."""
        positions = [table.columns.index(name) for name in table.order]
        while batch := await self.page(table, table.order, after, BATCH):
            yield batch
            after = tuple(batch[-1][at] for at in positions)

    async def page(self, table: CopiedTable, by: Sequence[str], after: Key | None, limit: int) -> Sequence[Row]:
        rows = await super().page(table, by, after, limit)
        for at in table.booleans:
            rows = [(*row[:at], bool(row[at]), *row[at + 1 :]) for row in rows]
        return rows

    async def add(self, table: CopiedTable, rows: Sequence[Row]) -> None:
        await self.replace(table, (), rows)

    async def put(self, table: CopiedTable, rows: Sequence[Row]) -> None:
        values = ", ".join("?" * len(table.columns))
        sql = f'INSERT OR REPLACE INTO "{table.name}" ({quoted(table.columns)}) VALUES ({values})'  # noqa: S608 - names
        await self.run_each(sql, rows)

    async def set_sequences(self, sequences: Mapping[str, int]) -> None:
        for name, last in sequences.items():
            if name not in _NUMBERED:
                continue
            if await self.fetch("SELECT 1 FROM sqlite_sequence WHERE name = $1", name):
                await self.fetch("UPDATE sqlite_sequence SET seq = max(seq, $1) WHERE name = $2", last, name)
            else:
                await self.fetch("INSERT INTO sqlite_sequence (seq, name) VALUES ($1, $2)", last, name)

    async def finish(self, sequences: Mapping[str, int]) -> None:
        await self.fetch("PRAGMA synchronous = FULL")
        await self.fetch("PRAGMA fullfsync = ON")
        await super().finish(sequences)
        with suppress(CopyError):  # what is committed is finished; the server copies the -wal file, too
            await self.fetch("PRAGMA wal_checkpoint(TRUNCATE)")

    async def _run(self, job: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, job)
        except ERRORS as error:
            raise self.failure(reason(error)) from None
        except OSError as error:
            raise self.failure(error.strerror or "it fails") from None

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._db is not None
        return self._db

    def _execute(self, sql: str, values: Row = ()) -> sqlite3.Cursor:
        return self._connection.execute(_PARAMETER.sub("?", sql), values)

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


def _megabytes(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"
