"""What tokens, pools and failed logins are in whatever database: all but the hottest look-ups."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, select

from tokenauth.models import ANY_LEASE, ID_BYTES, Instant, LeaseCheck, LeaseCursor, Pool, PoolCounts, PoolToken, Token
from tokenauth.stores.batching import Verb
from tokenauth.stores.changes import pool_rows
from tokenauth.stores.changes import pools as pool_verbs
from tokenauth.stores.changes import tokens as verbs
from tokenauth.stores.store import Lent, Note, TakeBack, Touched
from tokenauth.stores.tables import as_token, pool_token_columns, pool_tokens, token_columns, tokens

T = TypeVar("T")

_STEP = 10_000
"""Tokens that are ended in one transaction at the most."""


class Database(Protocol):
    """Something to read from and to write to."""

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Run a query outside of any write."""

    def write(self, verb: Verb, wish: Any, now: Instant) -> Awaitable[Any]:
        """Have a change made and committed together with whatever else waits."""


class SqlTokenStore:
    """TokenStore, but for the look-up by digest."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, token: Token, per_user: int, now: Instant) -> None:
        """Keep a token; the oldest of its user end if they are more than `per_user`."""
        await self._database.write(verbs.add_tokens, verbs.Add(token, per_user, now), now)

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
        return None if row is None else as_token(row)

    async def remove(self, digest: bytes, now: Instant) -> bool:
        """End one token."""
        return bool(await self._database.write(verbs.remove_tokens, verbs.Remove(digest, now), now))

    async def remove_all(self, username: str | None, now: Instant, keep: bytes | None = None) -> int:
        """End all tokens of a user, or of everybody, but one: step by step, between which others write."""
        total, ended = 0, _STEP
        wish = verbs.RemoveAll(username, keep, _STEP, now)
        while ended == _STEP:
            ended = int(await self._database.write(verbs.remove_all_tokens, wish, now))
            total += ended
        return total

    async def list(self, username: str | None, now: Instant, limit: int) -> Sequence[Token]:
        """Return the live tokens of a user, or of everybody, newest first."""
        query = select(*token_columns).where(tokens.c.expires_at > now).order_by(tokens.c.number.desc()).limit(limit)
        if username is not None:
            query = query.where(tokens.c.username == username)
        rows = await self._database.read(lambda db: db.execute(query).all())
        return [as_token(row) for row in rows]

    async def purge(self, now: Instant, limit: int) -> int:
        """Delete tokens that have expired."""
        return int(await self._database.write(verbs.purge_tokens, verbs.Purge(now, limit), now))


class SqlPoolStore:
    """PoolStore."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, pool: Pool, values: Sequence[str], now: Instant) -> bool:
        """Add free tokens, if there is room."""
        return bool(await self._database.write(pool_verbs.add_tokens, pool_verbs.Add(pool, values, now), now))

    async def fit(self, pool: Pool, values: Sequence[str], now: Instant) -> int:
        """Bring a pool closer to its capacity; say how many values it still lacks."""
        return int(await self._database.write(pool_verbs.fit_pool, pool_verbs.Add(pool, values, now), now))

    async def lease(
        self, pool: Pool, holder: str, now: Instant, username: str | None = None, counted: bool = False
    ) -> Lent:
        """Lease the token that has been free longest."""
        wish = pool_verbs.Lease(pool, holder, username, counted, now)
        lent: Lent = await self._database.write(pool_verbs.lease_tokens, wish, now)
        return lent

    async def extend(
        self, pool: Pool, value: str, now: Instant, claim: LeaseCheck = ANY_LEASE, free_too: bool = False
    ) -> Touched | None:
        """Let a lease run for its full time from now, if the claim holds."""
        wish = pool_verbs.Change(pool, value, claim, free_too, now)
        touched: Touched | None = await self._database.write(pool_verbs.extend_leases, wish, now)
        return touched

    async def extend_free(self, pool: Pool, before: Instant, now: Instant, limit: int) -> int:
        """Let free tokens wait for their full time from now."""
        return int(await self._database.write(pool_verbs.extend_free, pool_verbs.Some(pool, limit, now, before), now))

    async def release(self, pool: Pool, value: str, now: Instant, claim: LeaseCheck = ANY_LEASE) -> Touched | None:
        """End a lease, if the claim holds."""
        wish = pool_verbs.Change(pool, value, claim, False, now)
        touched: Touched | None = await self._database.write(pool_verbs.release_leases, wish, now)
        return touched

    async def release_next(self, pool: Pool, now: Instant, username: str | None = None) -> tuple[bool, int]:
        """End the lease of a user, or of anybody, that would end first; say how many tokens can be lent then."""
        wish = pool_verbs.Next(pool, username, now)
        released: tuple[bool, int] = await self._database.write(pool_verbs.release_next, wish, now)
        return released

    async def remove(self, pool: Pool, value: str, now: Instant, successor: str | None = None) -> bool:
        """Delete a token, or have another take its place."""
        wish = pool_verbs.Remove(pool, value, successor, now)
        return bool(await self._database.write(pool_verbs.remove_tokens, wish, now))

    async def get(self, pool: Pool, value: str, now: Instant) -> PoolToken | None:
        """Return the token of this value."""
        query = select(*pool_token_columns).where(pool_tokens.c.pool == pool.name, pool_tokens.c.value == value)
        row = await self._database.read(lambda db: db.execute(query).first())
        token = None if row is None else PoolToken(*row)
        return token if token is not None and pool.is_live(token, now) else None

    async def count(self, pool: Pool, now: Instant) -> PoolCounts:
        """Say how many tokens can be lent, and how many are."""
        values = pool_rows.terms(pool, now)
        row = await self._database.read(lambda db: db.execute(pool_rows.COUNT, values).one())
        return pool_rows.counts(*row)

    async def members(self, pool: Pool, now: Instant, after: str, limit: int) -> Sequence[PoolToken]:
        """Return tokens ordered by value."""
        behind = after.partition("\0")[0]  # no value has a NUL: whatever comes after one, none comes in between
        values = {**pool_rows.terms(pool, now), "after": behind, "limit": limit}
        rows = await self._database.read(lambda db: db.execute(pool_rows.MEMBERS, values).all())
        return [PoolToken(*row) for row in rows]

    async def leases(
        self, pool: Pool, now: Instant, after: LeaseCursor, limit: int
    ) -> Sequence[tuple[LeaseCursor, PoolToken]]:
        """Return the leased tokens in the order in which their leases end."""
        end, number = after
        values = {**pool_rows.terms(pool, now), "end": end, "number": number, "limit": limit}
        rows = await self._database.read(lambda db: db.execute(pool_rows.LEASES, values).all())
        return [((token.free_at, number), token) for number, *fields in rows for token in [PoolToken(*fields)]]

    async def purge(self, pool: Pool, now: Instant, limit: int) -> int:
        """Delete tokens that have expired."""
        return int(await self._database.write(pool_verbs.purge_pool, pool_verbs.Some(pool, limit, now), now))


class SqlFailureStore:
    """FailureStore, but for the look-up by key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def note(self, notes: Sequence[Note], now: Instant) -> None:
        """Make all of these changes, in one step."""
        await self._database.write(verbs.note_logins, notes, now)

    async def take_back(self, failed: TakeBack) -> None:
        """Remove failures from the counts that they were added to."""
        await self._database.write(verbs.take_back, failed, failed.now)

    async def purge_failures(self, before: Instant, limit: int) -> int:
        """Delete keys whose instant is long past."""
        return int(await self._database.write(verbs.purge_failures, verbs.Purge(before, limit), 0))
