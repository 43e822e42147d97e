"""Tokens and failed logins in SQL, over whatever database SQLAlchemy speaks to."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, select

from tokenauth.models import ID_BYTES, Failures, Instant, Token
from tokenauth.stores import verbs
from tokenauth.stores.tables import failures, token_columns, tokens
from tokenauth.stores.writer import Verb

T = TypeVar("T")


class Database(Protocol):
    """Something to read from and to write to."""

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Run a query outside of any write."""

    def write(self, verb: Verb, wish: Any, now: Instant) -> Awaitable[Any]:
        """Have a change made and committed together with whatever else waits."""


class SqlTokenStore:
    """TokenStore over a database that SQLAlchemy speaks to."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, token: Token, per_user: int, now: Instant) -> None:
        """Keep a token; the oldest of its user end if they are more than `per_user`."""
        await self._database.write(verbs.add_tokens, verbs.Add(token, per_user, now), now)

    async def get(self, digest: bytes) -> Token | None:
        """Return the token with this digest."""
        query = select(*token_columns).where(tokens.c.digest == digest)
        row = await self._database.read(lambda db: db.execute(query).first())
        return None if row is None else Token(*row)

    async def find(self, id: str) -> Token | None:
        """Return the token with this public id."""
        try:
            low = bytes.fromhex(id)
        except ValueError:
            return None
        if len(low) != ID_BYTES or low.hex() != id:
            return None
        match = tokens.c.digest.between(low, low + b"\xff" * (32 - ID_BYTES))
        row = await self._database.read(lambda db: db.execute(select(*token_columns).where(match)).first())
        return None if row is None else Token(*row)

    async def remove(self, digest: bytes, now: Instant) -> bool:
        """End one token."""
        return bool(await self._database.write(verbs.remove_tokens, verbs.Remove(digest, now), now))

    async def remove_all(self, username: str | None, now: Instant, keep: bytes | None = None) -> int:
        """End all tokens of a user, or of everybody, but one."""
        return int(await self._database.write(verbs.remove_all_tokens, verbs.RemoveAll(username, keep, now), now))

    async def list(self, username: str | None, now: Instant, limit: int) -> Sequence[Token]:
        """Return the live tokens of a user, or of everybody, newest first."""
        query = select(*token_columns).where(tokens.c.expires_at > now).order_by(tokens.c.number.desc()).limit(limit)
        if username is not None:
            query = query.where(tokens.c.username == username)
        rows = await self._database.read(lambda db: db.execute(query).all())
        return [Token(*row) for row in rows]

    async def purge(self, now: Instant, limit: int) -> int:
        """Delete tokens that have expired."""
        return int(await self._database.write(verbs.purge_tokens, verbs.Purge(now, limit), now))


class SqlFailureStore:
    """FailureStore over a database that SQLAlchemy speaks to."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def failures(self, keys: Sequence[bytes]) -> Mapping[bytes, Failures]:
        """Return what is counted under these keys."""
        query = select(failures).where(failures.c.key.in_(keys))
        rows = await self._database.read(lambda db: db.execute(query).all())
        return {key: Failures(count, last_at) for key, count, last_at in rows}

    async def fail(self, keys: Sequence[bytes], now: Instant, forget: float) -> None:
        """Count one more failure under each key."""
        await self._database.write(verbs.count_failures, verbs.Fail(keys, now, forget), now)

    async def clear(self, key: bytes, now: Instant) -> None:
        """Count nothing under this key any more."""
        await self._database.write(verbs.clear_failures, key, now)

    async def purge_failures(self, before: Instant, limit: int) -> int:
        """Delete keys whose last failure is long past."""
        return int(await self._database.write(verbs.purge_failures, verbs.Purge(before, limit), 0))
