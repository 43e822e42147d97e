"""A PostgreSQL database as one side of a copy."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

import asyncpg
from asyncpg.transaction import Transaction
from sqlalchemy import URL

from tokenauth.errors import CopyError
from tokenauth.stores.copying import BATCH, TABLES, CopiedTable, Key, Row, Side, Value
from tokenauth.stores.postgres import hosts
from tokenauth.stores.postgres.connections import CONNECT_TIMEOUT, UNAVAILABLE, reason
from tokenauth.stores.postgres.transaction import advisory_key

_SETTINGS = {
    "application_name": "tokenauth copy",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "lock_timeout": "10s",
    "tcp_keepalives_idle": "5",  # seconds
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "jit": "off",
    "work_mem": "64MB",  # to sort tokens by their numbers
    "maintenance_work_mem": "256MB",  # to build indexes
    # A page is read by an index, also from tables that were never analyzed.
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
}

_LOCK = "SELECT pg_try_advisory_lock($1)"
_USERS = """
    SELECT count(*), string_agg(DISTINCT coalesce(host(client_addr), 'a local or hidden address'), ', ')
    FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'tokenauth'
"""
_LOCK_PATIENCE = 50  # a copy that was killed keeps its lock until PostgreSQL has done what it was asked for last
_PATIENCE = 5
"""How often a lock or a closing connection is looked at again, in steps of 0.2 s."""

_SIZE = "SELECT coalesce(sum(pg_total_relation_size(name)), 0)::bigint FROM unnest($1::text[]::regclass[]) AS name"

_NEW_NUMBERS = """
    WITH numbered AS (SELECT digest, number, row_number() OVER (ORDER BY number, digest) AS turn FROM tokens),
    fitted AS (SELECT digest, number, turn + max(number - turn) OVER (ORDER BY turn) AS fitting FROM numbered)
    SELECT digest, fitting FROM fitted WHERE fitting <> number
"""
"""Each token gets its number or, if that is not higher than the one before, the next number."""

_SEQUENCE = "SELECT pg_get_serial_sequence($1, $2)"


class PostgresSide(Side):
    """A database on a server. A source is sealed by locks on its tables, as long as no server is connected to it."""

    unique_numbers = False
    collation = ' COLLATE "C"'  # as SQLite and Python order it
    indexes = "indexdef FROM pg_indexes WHERE schemaname = current_schema() AND indexname"
    sequences_query = """
        SELECT t.relname, s.last_value FROM pg_sequences s
        JOIN pg_depend d ON d.objid = format('%I.%I', s.schemaname, s.sequencename)::regclass AND d.refobjsubid > 0
        JOIN pg_class t ON t.oid = d.refobjid WHERE s.schemaname = current_schema()
    """

    def __init__(self, url: URL) -> None:
        """Open nothing yet."""
        super().__init__(hosts.name(url))
        self._arguments = url.get_dialect()().create_connect_args(url)[1]
        self._connection: asyncpg.Connection | None = None
        self._seal: Transaction | None = None

    @property
    def _db(self) -> asyncpg.Connection:
        assert self._connection is not None
        return self._connection

    async def open_source(self) -> None:
        with self._explained():
            await self._connect()

    async def open_alone(self) -> str | None:
        await self.open_source()
        await self.fetch("SET synchronous_commit = off")
        return await self.find_users()

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()  # closing it properly could block forever

    async def seal(self) -> str | None:
        with self._explained():
            users = await self.find_users()
            if users is not None:
                return users
            self._seal = self._db.transaction()
            await self._seal.start()
            names = ", ".join(f'"{table.name}"' for table in TABLES)
            await self._db.execute(f"LOCK TABLE {names} IN EXCLUSIVE MODE")
            users = await self.find_users()
            if users is not None:
                await self._seal.rollback()
                self._seal = None
            return users

    async def find_users(self) -> str | None:
        for _ in range(_PATIENCE):
            with self._explained():
                [(count, places)] = await self._db.fetch(_USERS)
            if count == 0:
                return None
            await asyncio.sleep(0.2)
        return f"{count} connection{'s' * (count != 1)} of tokenauth, from {places}"

    async def size(self) -> int:
        with self._explained():
            return int(await self._db.fetchval(_SIZE, [table.name for table in TABLES]))

    async def check_room(self, size: int) -> None:
        """Do nothing: it is not known where its files are."""

    async def fetch(self, sql: str, *values: Value) -> Sequence[Row]:
        with self._explained():
            return [tuple(row) for row in await self._db.fetch(sql, *values)]

    async def run_each(self, sql: str, each: Sequence[Row]) -> None:
        with self._explained():
            await self._db.executemany(sql, each)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        with self._explained():
            async with self._db.transaction():
                yield

    async def stream(self, table: CopiedTable, after: Key | None) -> AsyncIterator[Sequence[Row]]:
        """Yield the rows of one query: tokens have no index of their numbers."""
        sql = table.select(table.order, after is not None, False, self.collation)
        with self._explained():
            async with self._db.transaction():
                cursor = await self._db.cursor(sql, *(after or ()))
                while batch := await cursor.fetch(BATCH):
                    yield [tuple(row) for row in batch]

    async def find_new_numbers(self) -> Mapping[bytes, int]:
        with self._explained():
            return {row[0]: row[1] for row in await self._db.fetch(_NEW_NUMBERS)}

    async def add(self, table: CopiedTable, rows: Sequence[Row]) -> None:
        with self._explained():
            try:
                await self._insert(table, rows)
            except asyncpg.UniqueViolationError:  # the source has changed since the rows before were read
                await self.replace(table, (), rows)

    async def put(self, table: CopiedTable, rows: Sequence[Row]) -> None:
        for names in table.unique:
            positions = [table.columns.index(name) for name in names]
            await self.delete(table, names, [tuple(row[at] for at in positions) for row in rows])
        await self._insert(table, rows)

    async def _insert(self, table: CopiedTable, rows: Sequence[Row]) -> None:
        try:
            await self._db.copy_records_to_table(table.name, records=rows, columns=table.columns)
        except (asyncpg.DataError, TypeError, ValueError, OverflowError):  # from the driver; some texts have the value
            raise CopyError(
                f"{self.name} cannot store a row of the source's table {table.name!r}: a value has the wrong type"
            ) from None

    async def set_sequences(self, sequences: Mapping[str, int]) -> None:
        for table in TABLES:
            [name, *_] = table.order
            if len(table.order) == 1 and (own := await self._db.fetchval(_SEQUENCE, table.name, name)):
                highest = await self.last(table)
                last = max(sequences.get(table.name, 0), 0 if highest is None else int(highest[0] or 0))
                if last > 0:
                    await self.fetch("SELECT setval($1::text::regclass, $2)", own, last)

    async def finish(self, sequences: Mapping[str, int]) -> None:
        await self.fetch("SET synchronous_commit = on")
        await super().finish(sequences)

    async def _connect(self) -> None:
        """Connect, unless another copy uses the database: also one to or from itself."""
        self._connection = await hosts.Primaries().connect(
            **{
                **self._arguments,
                "timeout": CONNECT_TIMEOUT,
                "target_session_attrs": "primary",
                "server_settings": _SETTINGS,
            }
        )
        key = advisory_key("tokenauth copy")
        for _ in range(_LOCK_PATIENCE):
            if await self._db.fetchval(_LOCK, key):
                return
            await asyncio.sleep(0.2)
        raise CopyError(f"{self.name}: another `tokenauth copy` uses this database; wait until it is done")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except UNAVAILABLE as error:
            raise self.failure(reason(error)) from None
