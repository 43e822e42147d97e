"""PostgreSQL: any number of machines on one database, each with a cache that is notified of every revocation."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import URL, Connection, LargeBinary, Select, any_, bindparam, select
from sqlalchemy.dialects.postgresql import ARRAY

from tokenauth.clock import Clock
from tokenauth.errors import RetryLater, StartError, StoreUnavailable
from tokenauth.models import Failures, Instant, Token
from tokenauth.stores import schema
from tokenauth.stores.changes.clock import CLOCK
from tokenauth.stores.engine import Change, OnClockAdvance, Query, Rows, Values
from tokenauth.stores.postgres.connections import UNAVAILABLE, Connections, driver, reason
from tokenauth.stores.postgres.hosts import NoPrimary
from tokenauth.stores.postgres.listener import DatabaseClock, Listener
from tokenauth.stores.postgres.lookup import Lookup
from tokenauth.stores.postgres.transaction import PostgresTransaction
from tokenauth.stores.tables import as_checked_token, checked_columns, failures, marks, tokens

A = TypeVar("A")
V = TypeVar("V")

_START_TIMEOUT = 5.0
"""Seconds that `serve` waits for a server that refuses connections, is starting up or is about to be promoted."""

_START_PAUSE = 0.25
"""Seconds between two attempts to connect at a start."""

_keys = any_(bindparam("keys", type_=ARRAY(LargeBinary)))
_TOKENS = select(*checked_columns).where(tokens.c.digest == _keys)
_FAILURES = select(failures.c.key, failures.c.count, failures.c.last_at).where(failures.c.key == _keys)
_CLOCK = select(marks.c.at).where(marks.c.name == CLOCK)


class PostgresEngine:
    """Engine of one PostgreSQL database, which other machines may use at the same time."""

    identity = "any"
    """A database that replaces another of its name is used, if it has tables: `Listener` then clears the cache."""

    def __init__(
        self, url: URL, connections: int, clock: Clock | None, serving: bool, create: bool, copying: bool = False
    ) -> None:
        """Take `postgresql+asyncpg://...` and the number of connections. Without a `clock` the time is the database's.

        Unless it is for `serving`, it writes only the changes that are asked for. `create`: make missing tables,
        `copying` as those of an unfinished copy.
        """
        self._serving = serving
        self._create = create
        self._copying = copying
        database_clock = DatabaseClock()
        self.clock: Clock = clock or database_clock
        self.connections = Connections(url, connections, self.clock, clock is not None, database_clock.fresh)
        self.feed = Listener(self.connections, database_clock)
        self._tokens = _lookup(self.connections, _TOKENS, as_checked_token)
        self._failures = _lookup(self.connections, _FAILURES, lambda row: Failures(row[1], row[2]))

    async def start(self, on_clock_advance: OnClockAdvance) -> Instant:
        try:
            await self._connect()
            await self.connections.upgrade(self._create, self._copying)
            await self.feed.start()
            if self._serving:
                self.connections.standbys.start()
            row = await self.connections.read_once(lambda db: db.execute(_CLOCK).first())
        except BaseException as error:
            await self.feed.stop()
            await self.connections.discard()
            if not isinstance(error, (*UNAVAILABLE, StoreUnavailable, ValueError, OverflowError)):
                raise
            grants = '; docs/scaling.md, "Roles and rights", has the grants' if _lacks_rights(error) else ""
            raise StartError(f"the database {self.connections.name} cannot be used: {reason(error)}{grants}") from None
        self.feed.on_clock_advance = on_clock_advance  # not before: the caller compares its clock with the answer
        return 0.0 if row is None else float(row[0])

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (_START_TIMEOUT if self._serving else 0)
        while True:
            try:
                await self.connections.check_encoding()
            except UNAVAILABLE as error:
                if not _is_restarting(error) or loop.time() >= deadline:
                    raise
            else:
                return
            await asyncio.sleep(_START_PAUSE)

    async def stop(self, now: Instant) -> None:
        await self.feed.stop()
        await self.connections.stop(now if self._serving else None)

    async def ready(self) -> str | None:
        problem = await self.connections.probed_problem()
        if problem is not None:
            return problem
        try:
            version = await self.connections.read(schema.version)
        except RetryLater as refusal:
            return await self.connections.probed_problem() or f"store unreachable: {reason(refusal)}"
        return None if schema.serves(version) else f"schema is {version}, this release needs {schema.HEAD}"

    async def read(self, query: Query, values: Values, brief: bool = False) -> Rows:
        return await self.connections.read(lambda db: PostgresTransaction(driver(db)).rows(query, values))

    def apply(self, change: Change[A]) -> Awaitable[A]:
        return self.connections.apply(change)

    token_now = None
    """A look-up waits for the server."""

    async def token(self, digest: bytes) -> Token | None:
        """Look up a token; concurrent look-ups share a query.

        A former primary lacks what was issued since. So a token is unknown only if no other server was promoted.
        """
        while True:
            promotions = self.connections.primaries.promotions
            token = (await self._tokens.find(digest)).get(digest)
            if token is None:
                await self.connections.standbys.ask()
            if token is not None or promotions == self.connections.primaries.promotions:
                return token

    async def failures(self, keys: Sequence[bytes]) -> Mapping[bytes, Failures]:
        """Look up counts; concurrent look-ups share a query."""
        found = await self._failures.find(*keys)
        return {key: found[key] for key in keys if key in found}


def _is_restarting(error: BaseException | None) -> bool:
    restarting = (asyncpg.CannotConnectNowError, asyncpg.TargetServerAttributeNotMatched, ConnectionRefusedError)
    if isinstance(error, NoPrimary):
        return any(map(_is_restarting, error.errors))
    return error is not None and (isinstance(error, restarting) or _is_restarting(error.__cause__))


def _lacks_rights(error: BaseException | None) -> bool:
    return error is not None and (
        isinstance(error, asyncpg.InsufficientPrivilegeError | asyncpg.InvalidSchemaNameError)
        or _lacks_rights(error.__cause__)
    )


def _lookup(connections: Connections, query: Select[Any], from_row: Callable[[Sequence[Any]], V]) -> Lookup[V]:
    """Look up rows by `keys`, their first column."""

    def fetch(keys: Sequence[bytes], db: Connection) -> Mapping[bytes, V]:
        rows = PostgresTransaction(driver(db)).rows(query, {"keys": keys})
        return {row[0]: from_row(row) for row in rows}

    return Lookup(lambda keys: connections.read(partial(fetch, keys)))
