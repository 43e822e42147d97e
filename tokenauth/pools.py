"""Pools: generate tokens, and lend them: assign, keep alive, release, delete."""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence

from tokenauth import values
from tokenauth.clock import Clock
from tokenauth.errors import (
    InsufficientScope,
    InvalidRequest,
    LeaseLost,
    NoFreeToken,
    NotYourLease,
    PoolFull,
    RetryLater,
    UnknownPool,
    UnknownToken,
)
from tokenauth.logs import log
from tokenauth.models import ANY_LEASE, Identity, Instant, LeaseCheck, LeaseCursor, Pool, PoolCounts, PoolToken
from tokenauth.stores.store import Lent, Store, Touched

MAX_COUNT = 1000
"""Tokens that are made at once, listed at once, or changed in one step, at the most."""

MAX_TEXT = 256
"""Characters of a holder's name, and of a token."""

_PAUSE = 0.005
"""Seconds between two such steps, in which other processes write."""

_FILL = 10_000
"""Tokens that one step adds at the most while a pool is brought to its capacity."""

NewValue = Callable[[], str]
"""Makes the value of a new token."""


class Pools:
    """The pools that stand in the configuration. Every method reads the clock once."""

    def __init__(
        self, terms: Mapping[str, Pool], store: Store, clock: Clock, makers: Mapping[str, NewValue] | None = None
    ) -> None:
        """Lend on these terms; `makers` has the pools whose tokens look different from the usual ones."""
        self._terms = terms
        self._store = store
        self._clock = clock
        self._makers = makers or {}
        self._unfit = [pool for pool in terms.values() if pool.prefill]

    def find(self, name: str, user: Identity | None = None) -> Pool:
        """Return the terms of a pool. Raises UnknownPool, or InsufficientScope if they are not for this user."""
        pool = self._terms.get(name)
        if pool is None:
            raise UnknownPool
        if user is not None and pool.scope is not None and pool.scope not in user.scopes:
            raise InsufficientScope(pool.scope)
        return pool

    def find_managed(self, name: str, user: Identity | None) -> Pool:
        """Return the terms of a pool that this user manages. Raises UnknownPool, InsufficientScope."""
        pool = self.find(name, user)
        if user is not None and not pool.managed_by(user):
            raise InsufficientScope(pool.manage_scope)
        return pool

    def open_to(self, user: Identity | None = None) -> Sequence[Pool]:
        """List the pools that a user may use, or all."""
        return [
            pool for pool in self._terms.values() if user is None or pool.scope is None or pool.scope in user.scopes
        ]

    async def generate(self, pool: Pool, count: int) -> Sequence[str]:
        """Add `count` free tokens, all or none. Raises PoolFull, or InvalidRequest if they are too many at once."""
        if pool.capacity is not None and count > pool.capacity:
            raise PoolFull
        if not 1 <= count <= MAX_COUNT:
            raise InvalidRequest(f"count: must be from 1 to {MAX_COUNT}.")
        values = self._new_values(pool, count)
        if not await self._store.pools.add(pool, values, self._clock()):
            raise PoolFull
        return values

    async def assign(self, pool: Pool, holder: str, username: str | None = None) -> PoolToken:
        """Lease the token that has been free longest to a user; None: to whoever asks. Raises NoFreeToken."""
        now = self._clock()
        lent = await self._store.pools.lease(pool, holder, now, username)
        if lent.token is None:
            raise NoFreeToken(None if lent.next_end is None else max(1, math.ceil(lent.next_end - now)))
        return lent.token

    async def take(self, pool: Pool, holder: str, username: str | None = None) -> tuple[bool, int]:
        """Lend any token, as a counting semaphore is acquired; say whether there was one, and how many are left."""
        lent: Lent = await self._store.pools.lease(pool, holder, self._clock(), username, counted=True)
        return lent.token is not None, lent.left or 0

    async def give_back(self, pool: Pool, username: str | None = None) -> tuple[bool, int]:
        """End the lease of a user, or without one of anybody, that would end first.

        Say whether there was one, and how many tokens are free then.
        """
        return await self._store.pools.release_next(pool, self._clock(), username)

    async def keep_alive(self, pool: Pool, value: str, claim: LeaseCheck = ANY_LEASE) -> PoolToken:
        """Let a lease run for its full time from now. Raises UnknownToken, LeaseLost, NotYourLease."""
        now = self._clock()
        return _done(await self._store.pools.extend(pool, _named(value), now, claim), claim, now)

    async def refresh(self, pool: Pool, value: str, user: Identity | None = None) -> bool:
        """Let a token, lent or free, stay so for its full time; say whether it is lent.

        Free tokens are for those who manage the pool. Raises UnknownToken, NotYourLease, InsufficientScope.
        """
        now = self._clock()
        claim = LeaseCheck(username=None if user is None else user.username)
        managed = user is None or pool.managed_by(user)
        try:
            token = _done(await self._store.pools.extend(pool, _named(value), now, claim, managed), claim, now)
        except LeaseLost:
            raise InsufficientScope(pool.manage_scope) from None
        return token.holder is not None

    async def refresh_free(self, pool: Pool, user: Identity | None = None) -> int:
        """Let all free tokens wait for their full time from now, in small steps; say how many they were.

        Raises InsufficientScope unless this user manages the pool.
        """
        self.find_managed(pool.name, user)
        before = self._clock()
        found = await self._store.pools.count(pool, before)
        more = found.available > 0
        while more:
            more = await self._store.pools.extend_free(pool, before, self._clock(), MAX_COUNT) == MAX_COUNT
            await asyncio.sleep(_PAUSE)
        return found.available

    async def release(self, pool: Pool, value: str, claim: LeaseCheck = ANY_LEASE) -> None:
        """End a lease: the token is free. Raises UnknownToken, LeaseLost, NotYourLease."""
        now = self._clock()
        _done(await self._store.pools.release(pool, _named(value), now, claim), claim, now)

    async def release_by_force(self, pool: Pool, value: str, claim: LeaseCheck, by: str, reason: str | None) -> None:
        """End any user's lease, and log whose it was, who did that and why. Raises UnknownToken, LeaseLost."""
        now = self._clock()
        held = await self.get(pool, value)
        if claim.fence is None:
            claim = claim._replace(fence=held.fence)  # the lease that ends is the one that is logged
        try:
            _done(await self._store.pools.release(pool, value, now, claim), claim, now)
        except LeaseLost:
            raise LeaseLost("The token is free, or under another lease than you named. No lease was ended.") from None
        about = {"user": held.username, "holder": held.holder, "fence": claim.fence}
        log.warning("lease_forced", pool=pool.name, **about, by=by, reason=reason)

    async def delete(self, pool: Pool, value: str) -> None:
        """Delete a token, free or lent; where there is `prefill`, a new one takes its place. Raises UnknownToken."""
        successor = self._new_values(pool, 1)[0] if pool.prefill else None
        if not await self._store.pools.remove(pool, _named(value), self._clock(), successor):
            raise UnknownToken

    async def get(self, pool: Pool, value: str) -> PoolToken:
        """Return a token. Raises UnknownToken."""
        token = await self._store.pools.get(pool, _named(value), self._clock())
        if token is None:
            raise UnknownToken
        return token

    async def count(self, pool: Pool) -> PoolCounts:
        """Say how many tokens can be lent, and how many are."""
        return await self._store.pools.count(pool, self._clock())

    async def members(self, pool: Pool, after: str = "", limit: int = MAX_COUNT) -> Sequence[PoolToken]:
        """List tokens ordered by value, from the first one after `after`."""
        return await self._store.pools.members(pool, self._clock(), after, limit)

    async def leases(self, pool: Pool, after: LeaseCursor, limit: int) -> Sequence[tuple[LeaseCursor, PoolToken]]:
        """List the leased tokens with their places, in the order in which the leases end."""
        return await self._store.pools.leases(pool, self._clock(), after, limit)

    def now(self) -> Instant:
        """Read the clock that leases are judged by."""
        return self._clock()

    async def prefill(self) -> None:
        """Bring each pool with `prefill` to its capacity, once. No lease ends by it.

        One that cannot be written is left for the next call: whoever only validates tokens must not suffer for it.
        """
        for pool in list(self._unfit):
            try:
                await self._fill(pool)
                self._unfit.remove(pool)
            except RetryLater as refusal:
                log.warning("pool_not_filled", pool=pool.name, reason=refusal.code)

    async def purge(self, pool: Pool, now: Instant, limit: int) -> int:
        """Delete at most `limit` tokens of a pool that have expired; say how many there were."""
        return await self._store.pools.purge(pool, now, limit)

    async def _fill(self, pool: Pool) -> None:
        found = lacking = await self._store.pools.fit(pool, (), self._clock())
        while lacking:
            await asyncio.sleep(_PAUSE)
            values = self._new_values(pool, max(0, min(lacking, _FILL)))
            lacking = await self._store.pools.fit(pool, values, self._clock())
        if found > 0:
            log.info("pool_filled", pool=pool.name, capacity=pool.capacity)

    def _new_values(self, pool: Pool, count: int) -> list[str]:
        make = self._makers.get(pool.name, values.new_value)
        return [make() for _ in range(count)]


def named_holder(name: str, field: str = "holder") -> str:
    """Return the name that a holder gives himself. Raises InvalidRequest, which names the field, for what is none."""
    if not 1 <= len(name) <= MAX_TEXT:
        raise InvalidRequest(f"{field}: must have 1 to {MAX_TEXT} characters.")
    if not name.isprintable():
        raise InvalidRequest(f"{field}: has a character that cannot be printed.")
    return name


def _done(touched: Touched | None, claim: LeaseCheck, now: Instant) -> PoolToken:
    if touched is None:
        raise UnknownToken
    if touched.done:
        return touched.token
    if touched.token.is_leased(now) and not claim.matches_user(touched.token):
        raise NotYourLease
    raise LeaseLost


def _named(value: str) -> str:
    """Return a token that may exist: no database need be asked about any other. Raises UnknownToken."""
    if len(value) > MAX_TEXT or not value.isprintable():
        raise UnknownToken
    return value
