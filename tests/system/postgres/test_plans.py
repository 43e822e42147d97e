"""PostgreSQL caches plans. A plan that was made for empty tables must stay cheap when they have grown.

The tests count the rows that a change or a query reads. Nothing is timed.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import asyncpg
import pytest
from sqlalchemy import Connection, make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.contract.test_pool_cost import CHEAP, FEW, IN_LINE, LEASED, rows
from tests.promises.test_12_cost import CHANGES, EACH, PAGE, digest, kind
from tests.support.patience import be_patient
from tests.support.servers import START
from tests.support.steps import DirectEngine
from tests.system.postgres.nodes import fixed_time
from tokenauth.models import public_id
from tokenauth.stores.batching import UNMADE
from tokenauth.stores.cache import TokenCache
from tokenauth.stores.changes.failures import PurgeFailures
from tokenauth.stores.changes.tokens import PurgeRevocations, PurgeTokens
from tokenauth.stores.engine import Change, Query, Rows, Values
from tokenauth.stores.postgres import engine
from tokenauth.stores.postgres.at_once import AT_ONCE
from tokenauth.stores.postgres.connections import Connections, driver
from tokenauth.stores.postgres.transaction import PostgresTransaction
from tokenauth.stores.store import PoolStore, TokenStore
from tokenauth.stores.tables import metadata

A = TypeVar("A")
T = TypeVar("T")

MANY = 20_000
MOST = 5 * FEW
"""Maximum number of rows that one change or query may read."""

_KEEP = "ALTER TABLE {} SET (autovacuum_enabled = off)"
_FILL = [
    """
    INSERT INTO tokens (digest, username, credential, issued_at, expires_at, address, user_agent, name)
    SELECT sha256(n::text::bytea), 'user' || n % ({many} / {each}), 'c', {start} - 1,
        {start} + CASE WHEN n % 100 < {each} THEN -1 ELSE 86400 + n END, '', '',
        CASE WHEN n % ({many} / {each}) % 20 = 15 THEN 'job ' || n END
    FROM generate_series(0, {many} - 1) AS n
    """,
    """
    INSERT INTO revocations (digest, at)
    SELECT sha256(n::text::bytea), {start} - CASE WHEN n < {many} / 10 THEN 1000 ELSE 0 END
    FROM generate_series(0, {many} - 1) AS n
    """,
    """
    INSERT INTO pool_requests
        (pool, username, id, holder, count, priority, labels, since, turn, kept_until, asks, answers)
    SELECT '{line}', 'user ' || n, 'r' || n, '', 1, 0, '[]', {start} - 300, {start} - 300 + n % 300, {start} + 60, 1, 0
    FROM generate_series(0, {many} - 1) AS n
    """,
    "INSERT INTO failures (key, count, last_at) SELECT substr(digest, 1, 16), 1, at FROM revocations",
]
_LOOKED_AT = "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) FROM pg_stat_xact_user_tables"


class Direct(DirectEngine):
    """A PostgreSQL engine on one connection of the service's kind. It never commits."""

    def __init__(self, connection: AsyncConnection, ordinary: bool = False) -> None:
        """`ordinary`: make no change at once."""
        self._connection = connection
        self._ordinary = ordinary

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Run something on the connection."""
        return await self._connection.run_sync(work)

    async def read(self, query: Query, values: Values, brief: bool = False) -> Rows:
        return await self.run(lambda db: PostgresTransaction(driver(db)).rows(query, values))

    async def apply(self, change: Change[A]) -> A:
        """Make a change at once if PostgreSQL can, as the service does, and otherwise step by step."""

        def make(db: Connection) -> A:
            transaction = PostgresTransaction(driver(db), patience=60)
            if type(change) in AT_ONCE and not self._ordinary:
                [answer] = AT_ONCE[type(change)](transaction, [change])
                if answer is not UNMADE:
                    return cast(A, answer)
            [made] = type(change).make(transaction, [change])
            return made

        return await self.run(make)

    async def rows_read(self, ask: Callable[["Direct"], Awaitable[object]]) -> int:
        """Count the rows that something reads."""
        await self.execute("BEGIN")
        before = await self._count()
        await ask(self)
        after = await self._count()
        await self.execute("ROLLBACK")
        return after - before

    async def execute(self, sql: str) -> None:
        """Run a statement without a result."""
        await self._run(lambda plain: plain.execute(sql))

    async def fill(self, made: Iterable[tuple[object, ...]]) -> None:
        """Add pool tokens, in the form that `rows` returns."""
        records = [(*row, 1, False) for row in made]
        columns = ["pool", "value", "free_at", "holder", "fence", "retired"]
        await self._run(lambda plain: plain.copy_records_to_table("pool_tokens", records=records, columns=columns))

    async def _run(self, what: Callable[[asyncpg.Connection], Awaitable[object]]) -> None:
        await self.run(lambda db: driver(db).run_async(what))

    async def _count(self) -> int:
        found: int = await self.run(lambda db: db.execute(text(_LOOKED_AT)).scalar_one())
        return int(found)


@pytest.fixture
async def direct(url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Direct]:
    be_patient(monkeypatch)  # tables are filled with many rows
    connections = Connections(make_url(url), 1, fixed_time, caller_time=True)
    await connections.upgrade()
    async with connections._engine.connect() as connection:
        for table in metadata.tables:
            await connection.execute(text(_KEEP.format(table)))
        yield Direct(connection)
    await connections.discard()


Operation = Callable[[Direct], Awaitable[object]]


def pooled(ask: Callable[[PoolStore], Awaitable[object]], direct: Direct) -> Awaitable[object]:
    return ask(PoolStore(direct))


def changed(change: Change[Any], direct: Direct) -> Awaitable[object]:
    return direct.apply(change)


def tokens(direct: Direct) -> TokenStore:
    return TokenStore(direct, TokenCache(direct.token, direct.feed, 0))


KEYS = [digest(3)[:16], b"?" * 16]

READS: dict[str, Operation] = {
    "a token by its id": lambda direct: tokens(direct).find(public_id(digest(13))),
    "a user's tokens": lambda direct: tokens(direct).list("user13", START, 1000),
    "a user's logins": lambda direct: tokens(direct).list("user13", START, 1000, "login"),
    "a user's named tokens": lambda direct: tokens(direct).list("user13", START, 1000, "named"),
    "a page of all users' tokens": lambda direct: tokens(direct).list_by_end(PAGE, START, 5),
    "the throttle": lambda direct: direct.read(engine._FAILURES, {"keys": KEYS}),
}

LONG_AGO = START - 10**6
PURGES: Sequence[Change[int]] = (
    PurgeTokens(5, now=LONG_AGO),
    PurgeFailures(LONG_AGO, 5),
    PurgeRevocations(LONG_AGO, 5),
)

OPERATIONS: dict[str, Operation] = {
    **{name: partial(pooled, ask) for name, ask in CHEAP.items()},
    **{kind(change): partial(changed, change) for change in CHANGES},
    **{f"{kind(purge)}, and nothing is old": partial(changed, purge) for purge in PURGES},
    **READS,
}


@pytest.mark.parametrize(
    "share", [pytest.param(None, id="empty", marks=pytest.mark.faults), pytest.param(20, id="small")]
)
async def test_plans_of_small_tables_stay_cheap_when_they_grow(direct: Direct, share: int | None) -> None:
    """Small ones have one row in 20 of the pools' tokens."""
    made = [row for pool, leased in LEASED.items() for row in rows(pool, leased, MANY)]
    few = made[::share] if share else []
    await direct.fill(few)
    for ask in OPERATIONS.values():
        await direct.rows_read(ask)
    for statement in _FILL:
        await direct.execute(statement.format(many=MANY, each=EACH, start=int(START), line=IN_LINE.name))
    await direct.fill({*made} - {*few})
    rows_read = {name: await direct.rows_read(ask) for name, ask in OPERATIONS.items()}
    assert {name: count for name, count in rows_read.items() if count > MOST} == {}
    assert sum(rows_read.values()) > len(OPERATIONS), "must count rows"
