"""PostgreSQL: any number of machines on one database, each with a cache that hears of every removal."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from sqlalchemy import URL, Connection, bindparam, select

from tokenauth.errors import RetryLater, StartError, StoreUnavailable
from tokenauth.models import Clock, Instant, Token
from tokenauth.stores import schema, verbs
from tokenauth.stores.cached import CachedTokenStore
from tokenauth.stores.connections import UNAVAILABLE, Database, driver, reason
from tokenauth.stores.listener import DatabaseClock, Listener
from tokenauth.stores.sql import SqlFailureStore, SqlPoolStore, SqlTokenStore
from tokenauth.stores.tables import as_token, marks, token_columns, tokens
from tokenauth.stores.transaction import PostgresTransaction

_TOKEN = select(*token_columns).where(tokens.c.digest == bindparam("digest"))
_CLOCK = select(marks.c.at).where(marks.c.name == verbs.CLOCK)


class PostgresTokenStore(SqlTokenStore):
    """TokenStore whose removals are heard of by this process at once."""

    def __init__(self, database: Database, listener: Listener) -> None:
        super().__init__(database)
        self._listener = listener

    async def add(self, token: Token, per_user: int, now: Instant) -> None:
        """Keep a token; the oldest of its user end if they are more than `per_user`."""
        for ended in await self._database.write(verbs.add_tokens, verbs.Add(token, per_user, now), now):
            self._listener.tell(ended)

    async def get(self, digest: bytes) -> Token | None:
        """Return the token with this digest."""
        rows = await self._database.read(partial(_find, digest))
        return as_token(rows[0]) if rows else None

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


class PostgresStore:
    """Everything that tokenauth keeps, in one PostgreSQL database that any number of machines use."""

    tokens: CachedTokenStore
    pools: SqlPoolStore
    failures: SqlFailureStore

    def __init__(self, url: URL, cache_size: int, connections: int, clock: Clock | None = None) -> None:
        """Take `postgresql+asyncpg://...`, how many tokens each process remembers, and its connections.

        Without a `clock` the time is the database's.
        """
        self._database = Database(url, connections, clock is not None)
        self._cache_size = cache_size
        self._heard = DatabaseClock()
        self.clock: Clock = clock or self._heard
        self._listener = Listener(self._database, self._heard)

    async def start(self) -> Instant:
        """Bring the schema up to date and connect."""
        try:
            await self._database.upgrade()
            await self._listener.start()
            row = await self._database.read(lambda db: db.execute(_CLOCK).first())
        except BaseException as error:
            await self._listener.stop()
            await self._database.discard()
            if not isinstance(error, (*UNAVAILABLE, StoreUnavailable, ValueError)):
                raise
            raise StartError(f"the database {self._database.name} cannot be used: {reason(error)}") from None
        self.tokens = CachedTokenStore(
            PostgresTokenStore(self._database, self._listener), self._listener, self._cache_size
        )
        self.pools = SqlPoolStore(self._database)
        self.failures = SqlFailureStore(self._database)
        return 0.0 if row is None else float(row[0])

    async def stop(self, now: Instant) -> None:
        """Finish what is being written, remember `now`, and disconnect."""
        await self._listener.stop()
        await self._database.stop(now)

    async def ready(self) -> str | None:
        """Say what keeps the store from serving, if anything does."""
        try:
            if self._database.trouble is not None:
                await self._database.write(verbs.remember_now, None, self.clock())
            version = await self._database.read(schema.version)
        except RetryLater as refusal:
            trouble = self._database.trouble
            return f"store not writable: {trouble}" if trouble else f"store unreachable: {reason(refusal)}"
        return None if schema.serves(version) else f"schema is {version}, this release needs {schema.HEAD}"

    async def claim(self, duty: str, now: Instant, until: Instant) -> bool:
        """Take on a duty until an instant, unless somebody has it."""
        return bool(await self._database.write(verbs.claim, verbs.Claim(duty, now, until), now))

    async def purge_log(self, before: Instant, limit: int) -> int:
        """Delete old entries of the revocation log."""
        return int(await self._database.write(verbs.purge_revocations, verbs.Purge(before, limit), 0))


def _find(digest: bytes, db: Connection) -> Sequence[Any]:
    return PostgresTransaction(driver(db)).rows(_TOKEN, {"digest": digest})
