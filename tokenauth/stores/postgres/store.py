"""PostgreSQL: any number of machines on one database, each with a cache that hears of every removal."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import asyncpg
from sqlalchemy import URL, Connection, LargeBinary, Select, any_, bindparam, select
from sqlalchemy.dialects.postgresql import ARRAY

from tokenauth.clock import Clock
from tokenauth.errors import RetryLater, StartError, StoreUnavailable
from tokenauth.models import Failures, Instant, Token
from tokenauth.stores import schema
from tokenauth.stores.cache import CachedTokenStore
from tokenauth.stores.changes import tokens as verbs
from tokenauth.stores.engine import PostgresTransaction
from tokenauth.stores.postgres.connections import UNAVAILABLE, Database, driver, reason
from tokenauth.stores.postgres.listener import DatabaseClock, Listener
from tokenauth.stores.postgres.lookup import Found, Lookup
from tokenauth.stores.sql import SqlFailureStore, SqlPoolStore, SqlTokenStore
from tokenauth.stores.store import Hear, unheard
from tokenauth.stores.tables import as_token, failures, marks, token_columns, tokens

_START_PATIENCE = 5.0
"""Seconds that `serve` waits for a server that refuses connections or is starting up: it may be restarting."""

_START_PAUSE = 0.25
"""Seconds between two attempts to connect at a start."""

_keys = any_(bindparam("keys", type_=ARRAY(LargeBinary)))
_TOKENS = select(*token_columns).where(tokens.c.digest == _keys)
_FAILURES = select(failures.c.key, failures.c.count, failures.c.last_at).where(failures.c.key == _keys)
_CLOCK = select(marks.c.at).where(marks.c.name == verbs.CLOCK)


class PostgresTokenStore(SqlTokenStore):
    """TokenStore whose removals are heard of by this process at once."""

    def __init__(self, database: Database, listener: Listener) -> None:
        super().__init__(database)
        self._listener = listener
        self._tokens = _lookup(database, _TOKENS, as_token)

    async def add(self, token: Token, per_user: int, now: Instant) -> None:
        """Keep a token; the oldest of its user end if they are more than `per_user`."""
        for ended in await self._database.write(verbs.add_tokens, verbs.Add(token, per_user, now), now):
            self._listener.tell(ended)

    async def get(self, digest: bytes) -> Token | None:
        """Return the token with this digest."""
        return (await self._tokens.find(digest)).get(digest)

    async def remove(self, digest: bytes, now: Instant) -> bool:
        """End one token."""
        was = await super().remove(digest, now)
        self._listener.tell(digest)  # also when another process was quicker, whose news may be on their way
        return was

    async def remove_all(self, username: str | None, now: Instant, keep: bytes | None = None) -> int:
        """End all tokens of a user, or of everybody, but one."""
        try:
            return await super().remove_all(username, now, keep)
        finally:
            self._listener.doubt()


class PostgresFailureStore(SqlFailureStore):
    """FailureStore that looks up what several wish to know at once."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._failures = _lookup(database, _FAILURES, lambda row: Failures(row[1], row[2]))

    async def failures(self, keys: Sequence[bytes]) -> Mapping[bytes, Failures]:
        """Return what is counted under these keys."""
        found = await self._failures.find(*keys)
        return {key: found[key] for key in keys if key in found}


class PostgresStore:
    """Everything that tokenauth keeps, in one PostgreSQL database that any number of machines use."""

    tokens: CachedTokenStore
    pools: SqlPoolStore
    failures: PostgresFailureStore

    def __init__(
        self, url: URL, cache_size: int, connections: int, clock: Clock | None = None, serving: bool = True
    ) -> None:
        """Take `postgresql+asyncpg://...`, how many tokens each process remembers, and its connections.

        Without a `clock` the time is the database's. Unless it is for `serving`, no tables are created.
        """
        self._database = Database(url, connections, clock is not None)
        self._cache_size = cache_size
        self._serving = serving
        self._heard = DatabaseClock()
        self.clock: Clock = clock or self._heard
        self._listener = Listener(self._database, self._heard)

    async def start(self, hear: Hear = unheard) -> Instant:
        """Bring the schema up to date and connect."""
        try:
            await self._connect()
            await self._database.upgrade(self._serving)
            await self._listener.start()
            row = await self._database.read_once(lambda db: db.execute(_CLOCK).first())
        except BaseException as error:
            await self._listener.stop()
            await self._database.discard()
            if not isinstance(error, (*UNAVAILABLE, StoreUnavailable, ValueError, OverflowError)):
                raise
            raise StartError(f"the database {self._database.name} cannot be used: {reason(error)}") from None
        self.tokens = CachedTokenStore(
            PostgresTokenStore(self._database, self._listener), self._listener, self._cache_size
        )
        self.pools = SqlPoolStore(self._database)
        self.failures = PostgresFailureStore(self._database)
        self._listener.hear = hear  # not before: the caller compares its clock with what this returns
        return 0.0 if row is None else float(row[0])

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (_START_PATIENCE if self._serving else 0)
        while True:
            try:
                await self._database.demand_utf8()
            except UNAVAILABLE as error:
                if not _is_restarting(error) or loop.time() >= deadline:
                    raise
            else:
                return
            await asyncio.sleep(_START_PAUSE)

    async def stop(self, now: Instant) -> None:
        """Finish what is being written, remember `now`, and disconnect."""
        await self._listener.stop()
        await self._database.stop(now if self._serving else None)

    async def remember(self, now: Instant) -> None:
        """Let it be known that it has been `now`."""
        await self._database.write(verbs.remember_now, None, now)

    async def ready(self) -> str | None:
        """Say what keeps the store from serving, if anything does."""
        trouble = await self._database.verdict()
        if trouble is not None:
            return trouble
        try:
            version = await self._database.read(schema.version)
        except RetryLater as refusal:
            return await self._database.verdict() or f"store unreachable: {reason(refusal)}"
        return None if schema.serves(version) else f"schema is {version}, this release needs {schema.HEAD}"

    async def claim(self, duty: str, now: Instant, until: Instant) -> bool:
        """Take on a duty until an instant, unless somebody has it."""
        return bool(await self._database.write(verbs.claim, verbs.Claim(duty, now, until), now))

    async def purge_log(self, before: Instant, limit: int) -> int:
        """Delete old entries of the revocation log."""
        return int(await self._database.write(verbs.purge_revocations, verbs.Purge(before, limit), 0))


def _is_restarting(error: BaseException | None) -> bool:
    restarting = (asyncpg.CannotConnectNowError, ConnectionRefusedError)
    return error is not None and (isinstance(error, restarting) or _is_restarting(error.__cause__))


def _lookup(database: Database, statement: Select[Any], made: Callable[[Sequence[Any]], Any]) -> Lookup:
    """Look up what is made of the rows of a statement that selects them by `keys`, the first column."""

    def find(keys: Sequence[bytes], db: Connection) -> Found:
        rows = PostgresTransaction(driver(db)).rows(statement, {"keys": keys})
        return {row[0]: made(row) for row in rows}

    return Lookup(lambda keys: database.read(partial(find, keys)))
