"""Copies everything from one database to another, and compares both row by row.

A copy has two passes. The first adds rows in the order of their primary keys, and goes on where an earlier run was
interrupted. The second reads both databases in the order of a key that both have an index of, corrects what differs,
and reads what it has corrected again. If nothing else can write to the source during the second pass, the databases are
equal after it. Until then the target has the revision COPYING, with which no server starts.
"""

import asyncio
import marshal
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from sqlalchemy import Boolean, String, Table

from tokenauth.background import outlast
from tokenauth.errors import CopyError
from tokenauth.stores import schema
from tokenauth.stores.tables import marks, metadata, tokens

Value = str | bytes | int | float | None
Row = tuple[Value, ...]
Key = tuple[Value, ...]

BATCH = 5000
"""Rows that are in memory at the same time: read from each side, and written in one transaction."""


@dataclass(frozen=True)
class CopiedTable:
    """A table and how it is read: by its primary key at first, and by `key` when both sides are compared."""

    table: Table
    columns: Sequence[str]
    order: Sequence[str]
    key: Sequence[str]
    condition: str | None = None

    @property
    def name(self) -> str:
        return self.table.name

    @property
    def booleans(self) -> Sequence[int]:
        """The positions of columns that SQLite returns as numbers."""
        return [at for at, name in enumerate(self.columns) if isinstance(self.table.c[name].type, Boolean)]

    @property
    def unique(self) -> Sequence[Sequence[str]]:
        """Each set of columns that no two rows share, in both kinds of database."""
        return [self.key, *([*index.columns.keys()] for index in self.table.indexes if index.unique)]

    def key_of(self, row: Row) -> Key:
        return tuple(row[self.columns.index(name)] for name in self.key)

    def _terms(self, names: Sequence[str], collation: str) -> Sequence[str]:
        return [f'"{name}"{collation * isinstance(self.table.c[name].type, String)}' for name in names]

    def select(self, by: Sequence[str], after: bool, limited: bool, collation: str = "") -> str:
        """Return a query for rows in the order of some columns, from a key or from the start on.

        collation: what orders text by code points.
        """
        terms = ", ".join(self._terms(by, collation))
        parameters = [f"${number}" for number in range(1, len(by) + 1)] if after else []
        conditions = [] if self.condition is None else [self.condition]
        if after:
            conditions.append(f"({terms}) > ({', '.join(parameters)})")
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        limit = f" LIMIT ${len(parameters) + 1}" if limited else ""
        return f'SELECT {quoted(self.columns)} FROM "{self.name}"{where} ORDER BY {terms}{limit}'  # noqa: S608 - names

    def select_last(self, collation: str = "") -> str:
        """Return a query for the highest primary key."""
        terms = ", ".join(f"{term} DESC" for term in self._terms(self.order, collation))
        where = "" if self.condition is None else f" WHERE {self.condition}"
        return f'SELECT {quoted(self.order)} FROM "{self.name}"{where} ORDER BY {terms} LIMIT 1'  # noqa: S608 - names

    def count(self) -> str:
        """Return a query for the number of rows."""
        where = "" if self.condition is None else f" WHERE {self.condition}"
        return f'SELECT count(*) FROM "{self.name}"{where}'  # noqa: S608 - names


def _copied(table: Table) -> CopiedTable:
    columns = [column.name for column in table.c if column.computed is None]
    order = [column.name for column in table.primary_key]
    # On PostgreSQL there is no index of the numbers of tokens alone, and two of them may be equal.
    key = ["digest"] if table is tokens else order
    # The row that probes write has no meaning, and on SQLite no number.
    return CopiedTable(table, columns, order, key, "\"name\" <> 'probe'" if table is marks else None)


TABLES = [_copied(table) for table in metadata.sorted_tables]
"""All tables."""


_INDEXES = [str(index.name) for table in TABLES for index in table.table.indexes if not index.unique]
"""Indexes that are built after the rows are added, which takes a fraction of the time."""

_SELECT_STATE = f"SELECT content FROM {schema.COPY_STATE} WHERE kind = $1"  # noqa: S608 - constants
_SET_REVISION = "UPDATE alembic_version SET version_num = $1"


def quoted(names: Sequence[str]) -> str:
    """Return names of columns for SQL: some of them are keywords."""
    return ", ".join(f'"{name}"' for name in names)


class Side(ABC):
    """One of the two databases. All methods raise CopyError if it cannot be used.

    Parameters in SQL are `$1`, `$2` and so on, in this order.
    """

    unique_numbers: bool
    """Whether no two tokens can have the same number."""
    collation: str
    """What orders text by code points."""
    indexes: str
    """What selects the definition of an index: the beginning of a query that ends with a condition for its name."""
    sequences_query: str
    """Selects the last number that was given to a row, by table, where numbers are never given twice."""

    def __init__(self, name: str) -> None:
        """Open nothing yet. `name`: what messages call it, without a password."""
        self.name = name

    @abstractmethod
    async def open_source(self) -> None:
        """Connect to read."""

    @abstractmethod
    async def open_alone(self) -> str | None:
        """Connect to write, as the only user; return who else uses the database if that is not possible."""

    @abstractmethod
    async def close(self) -> None:
        """Disconnect, and let others use the database."""

    @abstractmethod
    async def seal(self) -> str | None:
        """Keep others from writing until `close`; return who uses the database if that is not possible."""

    @abstractmethod
    async def find_users(self) -> str | None:
        """Return who else uses the database, although it is sealed."""

    @abstractmethod
    async def size(self) -> int:
        """Return the bytes that the database takes on the disk."""

    @abstractmethod
    async def check_room(self, size: int) -> None:
        """Raise CopyError if the disk of the files, where it is known, has no room for that number of bytes."""

    @abstractmethod
    async def fetch(self, sql: str, *values: Value) -> Sequence[Row]:
        """Run a statement, and return its rows."""

    @abstractmethod
    async def run_each(self, sql: str, each: Sequence[Row]) -> None:
        """Run a change once for each set of values."""

    @abstractmethod
    def transaction(self) -> AbstractAsyncContextManager[object]:
        """Commit what is written meanwhile together."""

    @abstractmethod
    def stream(self, table: CopiedTable, after: Key | None) -> AsyncIterator[Sequence[Row]]:
        """Yield rows in the order of the primary key, from a key or from the start on."""

    @abstractmethod
    async def add(self, table: CopiedTable, rows: Sequence[Row]) -> None:
        """Write rows in one transaction. What contradicts them is deleted."""

    @abstractmethod
    async def put(self, table: CopiedTable, rows: Sequence[Row]) -> None:
        """Write rows, and delete what contradicts them."""

    @abstractmethod
    async def set_sequences(self, sequences: Mapping[str, int]) -> None:
        """Let the next numbers of some tables be higher than these."""

    async def open_target(self, source: str) -> bool:
        """Connect to write, as the only user. Return whether there is something to do.

        The database has all tables. If it is empty, it is an unfinished copy of this source from now on. If it has
        rows, and is no unfinished copy, there is nothing to do: this source may have been copied to it before.
        """
        users = await self.open_alone()
        if users is not None:
            raise CopyError(f"{self.name} is in use: {users}; stop the server that uses it")
        [(version,)] = await self.fetch("SELECT version_num FROM alembic_version")
        if version == schema.COPYING:
            for (begun,) in await self.fetch(_SELECT_STATE, "source"):
                if begun == source:
                    return True
                raise CopyError(
                    f"{self.name} is an unfinished copy of {begun!s}; finish that with the same command, or copy to a"
                    " new database"
                )
        else:
            for table in TABLES:
                if table.table is not marks and await self.fetch(f'SELECT 1 FROM "{table.name}" LIMIT 1'):  # noqa: S608
                    return False
        async with self.transaction():
            await self.fetch(schema.CREATE_COPY_STATE)
            await self.fetch("DELETE FROM marks")  # an empty database has the time at which it was made
            await self.fetch(f"INSERT INTO {schema.COPY_STATE} VALUES ('source', $1)", source)  # noqa: S608 - constants
            for name in _INDEXES:
                await self.fetch(f"INSERT INTO {schema.COPY_STATE} SELECT 'index', {self.indexes} = '{name}'")
                await self.fetch(f'DROP INDEX "{name}"')
            await self.fetch(_SET_REVISION, schema.COPYING)
        return True

    async def count(self, table: CopiedTable) -> int:
        """Return the number of rows."""
        [(count,)] = await self.fetch(table.count())
        return int(count or 0)

    async def last(self, table: CopiedTable) -> Key | None:
        """Return the highest primary key; None if there are no rows."""
        rows = await self.fetch(table.select_last(self.collation))
        return rows[0] if rows else None

    async def page(self, table: CopiedTable, by: Sequence[str], after: Key | None, limit: int) -> Sequence[Row]:
        """Return at most `limit` rows in the order of some columns, from a key or from the start on."""
        sql = table.select(by, after is not None, True, self.collation)
        return await self.fetch(sql, *(after or ()), limit)

    async def find_new_numbers(self) -> Mapping[bytes, int]:
        """Return numbers, by digest, for tokens that must have another one so that all are different.

        They do not change the order of tokens whose numbers differ.
        """
        return {}

    async def missing_indexes(self) -> Sequence[str]:
        """Return the definitions of indexes that are not built yet."""
        return [str(definition) for (definition,) in await self.fetch(_SELECT_STATE, "index")]

    async def build_index(self, definition: str) -> None:
        """Build one of the missing indexes."""
        async with self.transaction():
            await self.fetch(definition)
            await self.fetch(f"DELETE FROM {schema.COPY_STATE} WHERE content = $1", definition)  # noqa: S608 - constants

    async def replace(self, table: CopiedTable, stale: Sequence[Key], rows: Sequence[Row]) -> None:
        """Delete the rows with some keys, and write others, in one transaction. What contradicts them is deleted."""
        async with self.transaction():
            await self.delete(table, table.key, stale)
            await self.put(table, rows)

    async def delete(self, table: CopiedTable, names: Sequence[str], keys: Sequence[Key]) -> None:
        """Delete the rows with some values of these columns."""
        which = " AND ".join(f'"{name}" = ${number}' for number, name in enumerate(names, 1))
        await self.run_each(f'DELETE FROM "{table.name}" WHERE {which}', keys)  # noqa: S608 - names

    async def sequences(self) -> Mapping[str, int]:
        """Return the last number that was given to a row, by table, where numbers are never given twice."""
        return {str(name): int(last) for name, last in await self.fetch(self.sequences_query) if last is not None}

    async def finish(self, sequences: Mapping[str, int]) -> None:
        """Make the copy a database that can be served, whose next numbers are higher, in one durable transaction."""
        async with self.transaction():
            await self.set_sequences(sequences)
            await self.fetch(f"DROP TABLE {schema.COPY_STATE}")
            await self.fetch(_SET_REVISION, schema.HEAD)

    def failure(self, reason: str) -> CopyError:
        """Return the error of a database that cannot be used."""
        return CopyError(f"{self.name} cannot be used: {reason}; run the same command again to go on")


class TableReport(NamedTuple):
    """What was done with one table. digest: the SHA-256 of its rows in both databases, once they are equal."""

    name: str
    rows: int
    added: int
    corrected: int
    digest: str | None


class CopyReport(NamedTuple):
    """What a copy has done. in_use: who uses the source, so that the copy is not finished; else None."""

    source: str
    target: str
    tables: Sequence[TableReport]
    in_use: str | None


OnProgress = Callable[[str, str, int, int], object]
"""Is called with "copying", "building" or "comparing", to what, and how many rows or indexes of how many are done."""


async def copy(source: Side, target: Side, on_progress: OnProgress) -> CopyReport:
    """Copy everything. Both sides are not open, and are closed in the end. Raises CopyError."""
    try:
        await source.open_source()
        begun = await target.open_target(source.name)
        job = _Copy(source, target, on_progress)
        return await (job.run() if begun else job.check())
    finally:
        await target.close()
        await source.close()


class _Differs(Exception):
    """The databases are not equal."""


class _Copy:
    def __init__(self, source: Side, target: Side, on_progress: OnProgress) -> None:
        self._source = source
        self._target = target
        self._on_progress = on_progress
        self._renumbers = target.unique_numbers and not source.unique_numbers
        self._numbers: Mapping[bytes, int] = {}

    async def run(self) -> CopyReport:
        in_use = await self._source.seal()
        begun = [await self._target.last(table) is not None for table in TABLES if table.table is not marks]
        await self._target.check_room(await self._source.size())
        added = [await self._add(table) for table in TABLES]
        indexes = await self._target.missing_indexes()
        for number, definition in enumerate(indexes):
            self._on_progress("building", "indexes", number, len(indexes))
            await self._target.build_index(definition)
        self._on_progress("building", "indexes", len(indexes), len(indexes))
        if in_use is not None:
            in_use = await self._source.seal()
        if in_use is not None and not any(begun):
            # Nothing would be gained: what changes from now on is found at the end in any case.
            return self._report(
                [TableReport(table.name, n, n, 0, None) for table, n in zip(TABLES, added, strict=True)], in_use
            )
        if self._renumbers:
            self._numbers = await self._source.find_new_numbers()
        tables = [await self._compare(table, number) for table, number in zip(TABLES, added, strict=True)]
        in_use = in_use or await self._source.find_users()
        if in_use is None:
            finishing, _ = await outlast(self._target.finish(await self._source.sequences()))
            finishing.result()
        else:
            tables = [table._replace(digest=None) for table in tables]
        return self._report(tables, in_use)

    async def check(self) -> CopyReport:
        """Return the report of a copy that had finished before. Raises CopyError unless both databases are equal."""
        if await self._source.seal() is None:
            with suppress(_Differs):
                if self._renumbers:
                    self._numbers = await self._source.find_new_numbers()
                tables = [await self._compare(table, 0, correct=False) for table in TABLES]
                if await self._source.find_users() is None:
                    return self._report(tables, None)
        raise CopyError(
            f"{self._target.name} is not empty; if a copy to it has finished, set database.url to it. Otherwise copy to"
            " a new database, or move this one away first"
        )

    def _report(self, tables: Sequence[TableReport], in_use: str | None) -> CopyReport:
        return CopyReport(self._source.name, self._target.name, tables, in_use)

    async def _add(self, table: CopiedTable) -> int:
        """Add the rows that come after the last one of the target; return their number."""
        total, done = await self._source.count(table), await self._target.count(table)
        added = 0
        self._on_progress("copying", table.name, min(done, total), total)  # the source may have fewer rows by now
        last = -(2**63)
        async for batch in _ahead(self._source.stream(table, await self._target.last(table))):
            rows = batch
            if self._renumbers and table.table is tokens:
                rows, last = _with_unique_numbers(batch, last)
            await self._target.add(table, rows)
            added += len(rows)
            self._on_progress("copying", table.name, min(done + added, total), total)
        return added

    async def _compare(self, table: CopiedTable, added: int, correct: bool = True) -> TableReport:
        """Make the rows of the target equal to those of the source. Unless it may `correct` them, raise _Differs."""
        total = await self._source.count(table)
        digest = sha256()
        rows = corrected = 0
        after: Key | None = None
        self._on_progress("comparing", table.name, 0, total)
        while True:
            wanted, there = await asyncio.gather(
                self._page(table, after), self._target.page(table, table.key, after, BATCH)
            )
            end = min((table.key_of(page[-1]) for page in (wanted, there) if len(page) == BATCH), default=None)
            if wanted != there:
                wanted, there = _until(table, wanted, end), _until(table, there, end)
                if not correct and wanted != there:
                    raise _Differs
                corrected += await self._correct(table, after, wanted, there)
            # version 2 of the format is the same for equal values
            digest.update(b"".join([marshal.dumps(row, 2) for row in wanted]))
            rows += len(wanted)
            self._on_progress("comparing", table.name, rows, max(rows, total))
            if end is None:
                return TableReport(table.name, rows, added, corrected, digest.hexdigest())
            after = end

    async def _page(self, table: CopiedTable, after: Key | None) -> Sequence[Row]:
        rows = await self._source.page(table, table.key, after, BATCH)
        if self._numbers and table.table is tokens:
            return [self._renumbered(row) for row in rows]
        return rows

    def _renumbered(self, row: Row) -> Row:
        digest = row[_DIGEST]
        assert isinstance(digest, bytes)
        number = self._numbers.get(digest)
        return row if number is None else _with_number(row, number)

    async def _correct(self, table: CopiedTable, after: Key | None, wanted: Sequence[Row], there: Sequence[Row]) -> int:
        """Correct the rows after a key; return how many differed."""
        right, wrong = set(wanted), set(there)
        missing = [row for row in wanted if row not in wrong]
        stale = [table.key_of(row) for row in there if row not in right]
        if not missing and not stale:
            return 0
        await self._target.replace(table, stale, missing)
        found = await self._target.page(table, table.key, after, len(wanted))
        if found != wanted:
            raise CopyError(
                f"{self._target.name}: rows of {table.name!r} are not what was written to it;"
                " does another program write to it? Run the same command again"
            )
        return len({*stale, *map(table.key_of, missing)})


_token_columns = [column.name for column in tokens.c]
_DIGEST, _NUMBER = _token_columns.index("digest"), _token_columns.index("number")


def _with_number(row: Row, number: int) -> Row:
    return (*row[:_NUMBER], number, *row[_NUMBER + 1 :])


def _with_unique_numbers(rows: Sequence[Row], last: int) -> tuple[Sequence[Row], int]:
    """Return tokens in the order of their numbers with numbers that grow from `last` on, and the last number."""
    changed = []
    for row in rows:
        number = row[_NUMBER]
        assert isinstance(number, int)
        last = max(number, last + 1)
        changed.append(row if number == last else _with_number(row, last))
    return changed, last


def _until(table: CopiedTable, rows: Sequence[Row], end: Key | None) -> Sequence[Row]:
    """Return the rows up to a key. Python orders the values of keys as both databases do."""
    return rows if end is None else [row for row in rows if table.key_of(row) <= end]


async def _ahead(batches: AsyncIterator[Sequence[Row]]) -> AsyncIterator[Sequence[Row]]:
    """Yield batches, and read the next one meanwhile."""
    reading = asyncio.create_task(_next(batches))
    try:
        while batch := await reading:
            reading = asyncio.create_task(_next(batches))
            yield batch
    finally:
        reading.cancel()


async def _next(batches: AsyncIterator[Sequence[Row]]) -> Sequence[Row]:
    try:
        return await anext(batches)
    except StopAsyncIteration:
        return ()
