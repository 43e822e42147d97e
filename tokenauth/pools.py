"""Pools: generate tokens and lease them: assign, keep alive, release, delete."""

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

from tokenauth import values
from tokenauth.background import finished
from tokenauth.clock import Clock
from tokenauth.errors import (
    AlreadyReserved,
    ClientGone,
    InsufficientScope,
    InvalidRequest,
    LeaseLost,
    NoFreeToken,
    NotYourLease,
    PlaceLost,
    PoolFull,
    Refusal,
    RetryLater,
    TooManyLeases,
    UnknownMember,
    UnknownPool,
    UnknownRequest,
    UnknownToken,
)
from tokenauth.login_queue import DisconnectCheck, never_disconnected
from tokenauth.logs import log
from tokenauth.models import (
    ANY_LEASE,
    START_OF_LEASES,
    START_OF_LINE,
    STARTS,
    ForcedEnd,
    Grant,
    Identity,
    Instant,
    LeaseChange,
    LeaseCheck,
    LeaseCursor,
    LeaseRequest,
    LeasesAndPlaces,
    LeaseTerms,
    ListCursor,
    ListKind,
    ListPart,
    Place,
    Pool,
    PoolCounts,
    PoolToken,
    Reservation,
    is_visible,
)
from tokenauth.settings import durations
from tokenauth.settings.durations import Duration
from tokenauth.stores.store import Store
from tokenauth.waiting import Waiter, Waiting, note_left
from tokenauth.waiting_line import KEPT, LAST

T = TypeVar("T")

MAX_COUNT = 1000
"""Maximum number of tokens that are generated, listed or changed in one step."""

MAX_TEXT = 256
"""Maximum length of a holder's name, and of a token, in characters."""

MAX_RESERVATION = 366 * 86400
"""Maximum number of seconds for which a member is reserved."""

MAX_WAIT = 60.0
"""Maximum number of seconds for which a request is held."""

MAX_LEASES = 100
"""Maximum number of tokens that one request leases."""

MAX_PRIORITY = 100
"""Priorities are from minus this to this."""

MAX_ID = 128
"""Maximum length of a request's id, in characters."""

MAX_LABELS = 20
"""Maximum number of labels in a request."""

MAX_LOOKED = 10_000
"""Leases and requests of all users that are looked at for those of one, before an answer."""

_PAUSE = 0.005
"""Seconds between two steps of a long change, in which other processes can write."""

_LATE = 60.0
"""Seconds in which a lease that lapsed is looked for once more: the clocks of nodes differ."""

_FILL_BATCH = 10_000
"""Maximum number of tokens that one step adds while a pool is filled to its capacity."""

NewValue = Callable[[], str]
"""Makes the value of a new token."""


@dataclass(slots=True)
class LeaseCounters:
    """What this process has seen of a pool since its start.

    denied: requests without a place in line that got nothing. waited: requests that had one and were granted.
    """

    granted: int = 0
    denied: int = 0
    waited: int = 0
    released: int = 0
    lapsed: int = 0
    forced: int = 0
    seconds_waited: float = 0.0
    seconds_held: float = 0.0


class Waits(NamedTuple):
    """A request that still waits, and is to be sent again."""

    id: str
    place: Place


class Pools:
    """The pools of the configuration.

    Where a method takes a user, None means any user. Each method reads the clock once.
    """

    def __init__(
        self, pools: Mapping[str, Pool], store: Store, clock: Clock, new_values: Mapping[str, NewValue] | None = None
    ) -> None:
        """`new_values` has the pools whose tokens are not made by `values.new_value`."""
        self._pools = pools
        self._store = store
        self._clock = clock
        self._new_value = new_values or {}
        self._unfilled = [pool for pool in pools.values() if pool.prefill or pool.members]
        self.waiting = Waiting(store.pools, clock, self.log_lapse)
        self.background = self.waiting.background
        self.counters = {name: LeaseCounters() for name in pools}
        self._lapses_since: dict[str, Instant] = {}  # by pool: leases that ended earlier have been logged

    def find(self, name: str, user: Identity | None = None) -> Pool:
        """Return a pool. Raises UnknownPool, or InsufficientScope if the user may not use it."""
        pool = self._pools.get(name)
        if pool is None:
            raise UnknownPool
        if user is not None and pool.scope is not None:
            user.require_scope(pool.scope)
        return pool

    def find_managed(self, name: str, user: Identity | None) -> Pool:
        """Return a pool that the user manages. Raises UnknownPool, InsufficientScope."""
        pool = self.find(name, user)
        if user is not None:
            user.require_scope(pool.manage_scope)
        return pool

    def usable_by(self, user: Identity | None = None) -> Sequence[Pool]:
        """List the pools that the user may use; without a user, all pools."""
        return [
            pool for pool in self._pools.values() if user is None or pool.scope is None or pool.scope in user.scopes
        ]

    async def generate(self, pool: Pool, count: int, by: str | None = None) -> Sequence[str]:
        """Add `count` free tokens, all or none, and return their values. Log which manager did that, if one did.

        Raises PoolFull, or InvalidRequest if `count` is not from 1 to MAX_COUNT.
        """
        if pool.members:
            raise PoolFull("The pool has exactly the members in the configuration. No token was generated.")
        if pool.capacity is not None and count > pool.capacity:
            raise PoolFull
        if not 1 <= count <= MAX_COUNT:
            raise InvalidRequest(f"count: must be from 1 to {MAX_COUNT}.")
        values = self._new_values(pool, count)
        now = self._clock()
        if pool.capacity is not None and now - pool.token_ttl >= self._lapses_since.get(pool.name, 0.0):
            await self._note_all_lapsed(pool, now)  # expired tokens are deleted for new ones
        await self._add(pool, values, now, by)
        return values

    @finished
    async def _add(self, pool: Pool, values: Sequence[str], now: Instant, by: str | None) -> None:
        if not await self._store.pools.generate(pool, values, now):
            raise PoolFull
        if by is not None:
            log.info("pool_tokens_generated", pool=pool.name, count=len(values), by=by)
        self.waiting.wake(pool)

    async def assign(
        self,
        pool: Pool,
        holder: str,
        username: str | None = None,
        ttl: Duration | None = None,
        labels: Sequence[str] = (),
    ) -> PoolToken:
        """Lease the token that has been free longest, for `ttl` instead of `lease_ttl`.

        Raises NoFreeToken, TooManyLeases, or InvalidRequest if no member of the pool has all of `labels`, or `ttl` is
        not from 1 s to the pool's `lease_ttl`. A lease without a `username` belongs to no user: anyone may extend or
        release it.
        """
        if labels:
            check_labels(pool, labels)
        seconds = None if ttl is None else durations.checked("ttl", ttl, 1, pool.lease_ttl)
        now = self._clock()
        result = await self._store.pools.assign(pool, holder, now, username, False, seconds, labels)
        if result.over_limit:
            self.counters[pool.name].denied += 1
            raise TooManyLeases
        if result.token is None:
            self.counters[pool.name].denied += 1
            retry_after = None if result.next_end is None else max(1, math.ceil(result.next_end - now))
            raise NoFreeToken(retry_after, NoFreeToken.of_members if pool.members else None)
        self._note_lease(pool, result.token, result.lapsed)
        return result.token

    async def lease(
        self, pool: Pool, user: Identity, terms: LeaseTerms, disconnected: DisconnectCheck = never_disconnected
    ) -> Grant | Waits:
        """Lease as many tokens as the terms say, or wait for them in line, for as long as the terms say.

        A request that is sent again keeps its place, and has the same leases while they run. If the client is seen to
        have disconnected before it is answered, it gets no lease. The server does not see it of one that ends its side
        right after the request, which may still read: that lease lapses.
        Raises InvalidRequest, InsufficientScope, NoFreeToken, TooManyLeases, LeaseLost, RequestDiffers, TooManyPlaces,
        PlaceLost, ClientGone.
        """
        try:
            _check_terms(pool, user, terms)
            seconds = None if terms.ttl is None else durations.checked("ttl", terms.ttl, 1, pool.lease_ttl)
        except (InvalidRequest, InsufficientScope) as refusal:
            return await self._repeat(pool, user, terms, refusal)
        start = self._clock()
        id, keep = terms.id, None
        if terms.wait is not None:
            id, keep = id or secrets.token_hex(12), terms.wait + KEPT
        answer = await self._ask(pool, user.username, id, terms, seconds, keep)
        if isinstance(answer, LeaseRequest) and id is not None:
            if answer.number >= LAST:
                shown = {"count": answer.count, "priority": answer.priority}
                log.info("request_waits", pool=pool.name, user=user.username, holder=answer.holder, **shown)
            waiter = Waiter(answer, terms.id is not None, disconnected)
            granted = await self.waiting.wait(pool, waiter, terms.wait or 0)
            if granted is None:
                place = await self._store.pools.find_place(pool, answer.key, self._clock())
                if place is not None:
                    return Waits(id, place)
                # it was taken out of the line, or served when it was sent once more, to another process
                answer = await self._ask(pool, user.username, id, terms, seconds, None, known=True)
            else:
                answer = granted
        if isinstance(answer, Refusal):
            self.counters[pool.name].denied += 1
            raise answer
        assert isinstance(answer, Grant)
        if disconnected():
            self.waiting.put_back(pool, answer, terms.id is not None)
            raise ClientGone
        if answer.before:
            self._note_grant(pool, answer, start)
        return answer

    async def _repeat(self, pool: Pool, user: Identity, terms: LeaseTerms, refusal: Refusal) -> Grant:
        """Answer a request that was granted before the settings changed. Raises `refusal` for others.

        One that waits leaves the line.
        """
        if terms.id is not None:
            ttl = None if terms.ttl is None else durations.checked("ttl", terms.ttl, 1, math.inf)
            answer = await self._ask(pool, user.username, terms.id, terms, ttl, None, known=True)
            if isinstance(answer, LeaseLost):
                raise answer
            if isinstance(answer, Grant):
                return answer
            if isinstance(answer, PlaceLost):
                with suppress(UnknownRequest):
                    await self.leave_line(pool, user.username, terms.id)
        raise refusal

    async def _ask(
        self,
        pool: Pool,
        username: str,
        id: str | None,
        terms: LeaseTerms,
        ttl: float | None,
        keep: float | None,
        known: bool = False,
    ) -> Grant | LeaseRequest | Refusal:
        wanted = terms.count, terms.priority, ttl, terms.labels
        return await self._store.pools.ask(pool, username, id, terms.holder, self._clock(), *wanted, keep, known)

    async def list_requests(self, pool: Pool, limit: int) -> tuple[int, Sequence[LeaseRequest]]:
        """Return how many requests wait, and the first of them in order."""
        now = self._clock()
        found = await self._store.pools.list_requests(pool, now, limit)
        waiting = len(found) if len(found) < limit else await self._store.pools.count_requests(pool, now)
        return waiting, found

    @finished
    async def leave_line(self, pool: Pool, username: str, id: str) -> None:
        """Take a request out of the line. Raises UnknownRequest."""
        now = self._clock()
        left = await self._store.pools.leave(pool, (username, id), now) if id.isprintable() else None
        if left is None:
            raise UnknownRequest
        note_left(pool, left, now)
        self.waiting.drop(pool, (username, id))
        self.waiting.wake(pool)

    async def count_leases_of(self, username: str) -> int:
        """Return how many tokens a user has leased, in all pools."""
        return sum([len(await self._leases_of(pool, username)) for pool in self.usable_by()])

    async def end_leases_and_places(
        self, username: str, reason: str | None
    ) -> AsyncIterator[tuple[Pool, PoolToken | None]]:
        """End all leases of a user, and take the user's requests out of all lines, as a command does.

        Yield each: the token as it was, or None for a request.
        """
        for pool in self.usable_by():
            # First the requests: otherwise the next one in line gets the token that its own user has lost.
            for request, _ in await self._places_of(pool, username):
                with suppress(UnknownRequest):  # it has just left
                    await self.leave_line(pool, username, request.id)
                    yield pool, None
            for token in await self._leases_of(pool, username):
                with suppress(LeaseLost, UnknownToken):  # it has just ended
                    check = LeaseCheck(fence=token.fence)
                    yield pool, await self.force_release(pool, token.value, check, "", reason)

    async def _leases_of(self, pool: Pool, username: str) -> Sequence[PoolToken]:
        return await _read_all(
            partial(self._store.pools.list_leases_of, pool, username, self._clock()), START_OF_LEASES
        )

    async def _places_of(self, pool: Pool, username: str) -> Sequence[tuple[LeaseRequest, Place]]:
        return await _read_all(partial(self._store.pools.list_places_of, pool, username, self._clock()), START_OF_LINE)

    async def acquire(self, pool: Pool, holder: str, username: str | None = None) -> tuple[bool, int]:
        """Lease any token, as one acquires a counting semaphore.

        Return whether there was a free one, and how many are free now.
        """
        result = await self._store.pools.assign(pool, holder, self._clock(), username, counted=True)
        if result.token is None:
            self.counters[pool.name].denied += 1
        else:
            self._note_lease(pool, result.token, result.lapsed)
        return result.token is not None, result.left or 0

    async def release_next(self, pool: Pool, username: str | None = None) -> tuple[bool, int]:
        """Release the token whose lease would end first, as one releases a counting semaphore.

        Return whether there was a lease, and how many tokens are free now.
        """
        done, left = await self._store.pools.release_next(pool, self._clock(), username)
        if done:
            self.counters[pool.name].released += 1
            self.waiting.wake(pool)
        return done, left

    async def keep_alive(self, pool: Pool, value: str, check: LeaseCheck = ANY_LEASE) -> PoolToken:
        """Extend a lease to its full time from now. Raises UnknownToken, LeaseLost, NotYourLease."""
        now = self._clock()
        change = await self._store.pools.keep_alive(pool, _checked(value), now, check)
        return await self._require_lease(pool, change, check, now)

    @finished
    async def keep_alive_any(self, pool: Pool, value: str, user: Identity | None = None) -> bool:
        """Extend the lease of a token, or the life of a free one, to its full time from now.

        Return whether the token is leased. Free tokens need the manage scope. Raises UnknownToken, NotYourLease,
        InsufficientScope.
        """
        now = self._clock()
        check = LeaseCheck(username=None if user is None else user.username)
        managed = user is None or pool.managed_by(user)
        change = await self._store.pools.keep_alive(pool, _checked(value), now, check, managed)
        if change is not None and change.before.unlogged is not None and change.token.holder is None:
            self.log_lapse(pool, change.before)
        try:
            token = _require_granted(change, check, now)
        except LeaseLost:
            raise InsufficientScope(pool.manage_scope) from None
        return token.holder is not None

    async def keep_alive_free(self, pool: Pool, user: Identity | None = None) -> int:
        """Extend the life of all free tokens to its full time from now, in small steps. Return their number.

        Raises InsufficientScope unless the user manages the pool.
        """
        self.find_managed(pool.name, user)
        start = self._clock()
        await self._note_all_lapsed(pool, start)
        counts = await self._store.pools.count(pool, start)
        more = counts.available > 0
        while more:
            more = await self._store.pools.keep_alive_free(pool, start, self._clock(), MAX_COUNT) == MAX_COUNT
            await asyncio.sleep(_PAUSE)
        return counts.available

    async def release(self, pool: Pool, value: str, check: LeaseCheck = ANY_LEASE) -> None:
        """End a lease. The token is free at once. Raises UnknownToken, LeaseLost, NotYourLease."""
        now = self._clock()
        if self.waiting.someone_waits(pool):
            on_release = partial(self._note_release, pool, now)
            change = await self.waiting.release(pool, _checked(value), now, check, on_release)
            await self._require_lease(pool, change, check, now)
            return
        change = await self._store.pools.release(pool, _checked(value), now, check)
        await self._require_lease(pool, change, check, now)
        if change is not None:
            self._note_release(pool, now, change.before)
            self.waiting.wake(pool)

    @finished
    async def force_release(self, pool: Pool, value: str, check: LeaseCheck, by: str, reason: str | None) -> PoolToken:
        """End the lease of any user, log it, and return the token as it was. Raises UnknownToken, LeaseLost."""
        now = self._clock()
        change = await self._store.pools.force_end(pool, _checked(value), now, by, reason, check)
        forced = _forced(pool, change, now, by, reason, taken=False)
        self.counters[pool.name].forced += 1
        self.waiting.wake(pool)
        return forced.before

    @finished
    async def take_over(
        self, pool: Pool, value: str, holder: str, username: str, check: LeaseCheck, reason: str | None
    ) -> PoolToken:
        """End the lease of any user, log it, and lease the token to `username`. Raises UnknownToken, LeaseLost."""
        now = self._clock()
        change = await self._store.pools.force_end(pool, _checked(value), now, username, reason, check, holder)
        forced = _forced(pool, change, now, username, reason, taken=True)
        self.counters[pool.name].forced += 1
        return forced.token

    @finished
    async def delete(self, pool: Pool, value: str, by: str | None = None) -> None:
        """Delete a token, free or leased. With `prefill` or members, a new one replaces it.

        Log which manager did that, if one did. Raises UnknownToken.
        """
        successor = self._new_values(pool, 1)[0] if pool.prefill or pool.members else None
        now = self._clock()
        deleted = await self._store.pools.delete(pool, _checked(value), now, successor)
        if deleted is None:
            raise UnknownToken
        if deleted.unlogged is not None and not deleted.is_leased(now):
            self.log_lapse(pool, deleted)
        if by is not None:
            log.info("pool_token_deleted", pool=pool.name, by=by)
        self.waiting.wake(pool)

    @finished
    async def reserve(
        self, pool: Pool, member: str, until: Duration, username: str | None, note: str, by: str, replace: bool = False
    ) -> PoolToken:
        """Keep a member from being leased, except by `username`. A lease that it has goes on.

        until: an instant, or as text, the time from now. `replace`: also if someone else has reserved it.
        Raises UnknownMember, AlreadyReserved, or InvalidRequest unless it ends within MAX_RESERVATION.
        """
        now = self._clock()
        seconds = durations.parse_exact(until) if isinstance(until, str) else until - now
        if seconds is None or not 0 < seconds <= MAX_RESERVATION:
            raise InvalidRequest(
                "until: must be an instant in Unix seconds, or a duration from now such as '2h', and in at most"
                f" {MAX_RESERVATION // 86400} days."
            )
        end = int(now) + seconds if isinstance(until, str) else until
        reservation = Reservation(end, username, note, by)
        change = await self._change_reservation(pool, member, reservation, now, replace)
        if change.after is None:
            found = change.before.reservation
            raise AlreadyReserved(*(() if found is None else (found.by, found.until)))
        log.info("member_reserved", pool=pool.name, member=member, until=end, user=username, note=note, by=by)
        return change.after

    @finished
    async def unreserve(self, pool: Pool, member: str, by: str) -> None:
        """End the reservation of a member, if it has one. Raises UnknownMember."""
        now = self._clock()
        change = await self._change_reservation(pool, member, None, now)
        if pool.reservation(change.before, now) is not None:
            log.info("member_unreserved", pool=pool.name, member=member, by=by)

    async def _change_reservation(
        self, pool: Pool, member: str, reservation: Reservation | None, now: Instant, replace: bool = False
    ) -> LeaseChange:
        if member not in pool.members:
            raise UnknownMember
        change = await self._store.pools.reserve(pool, member, reservation, now, replace)
        if change is None:
            raise UnknownMember
        self.waiting.wake(pool)
        return change

    async def members(self, pool: Pool) -> Sequence[PoolToken]:
        """List the members of a pool, and what was taken out of the configuration and is still leased, by name."""
        found = await self._store.pools.members(pool, self._clock())
        return sorted(found, key=lambda token: token.member or "")

    async def get(self, pool: Pool, value: str) -> PoolToken:
        """Return a token. Raises UnknownToken."""
        token = await self._store.pools.get(pool, _checked(value), self._clock())
        if token is None:
            raise UnknownToken
        return token

    async def count(self, pool: Pool) -> PoolCounts:
        return await self._store.pools.count(pool, self._clock())

    async def count_waiting(self, pool: Pool) -> int:
        """Return how many requests wait in line."""
        return await self._store.pools.count_requests(pool, self._clock())

    async def list_leases_and_places(self, user: Identity, after: ListCursor | None = None) -> LeasesAndPlaces:
        """List what a user has leased in all pools that they may use, and then where the user waits, from a cursor on.

        A page ends when MAX_COUNT or more were found, or MAX_LOOKED leases and requests of all users were looked at:
        it may be empty, and yet there is a next one. Raises InvalidRequest for a cursor of an unknown pool.
        """
        leases: list[tuple[Pool, PoolToken]] = []
        places: list[tuple[Pool, LeaseRequest, Place]] = []
        looked, now, store = 0, self._clock(), self._store.pools
        for kind, pool, start in _lists_from(after, self.usable_by(user)):
            cursor: tuple[Instant, int] | None = start
            while cursor is not None:
                if looked >= MAX_LOOKED or len(leases) + len(places) >= MAX_COUNT:
                    return LeasesAndPlaces(leases, places, ListCursor(kind, pool.name, cursor))
                if kind == "leases":
                    tokens, count, cursor = await store.list_leases_of(pool, user.username, now, cursor)
                    leases += [(pool, token) for token in tokens]
                else:
                    waits, count, cursor = await store.list_places_of(pool, user.username, now, cursor)
                    places += [(pool, *each) for each in waits]
                looked += count
        return LeasesAndPlaces(leases, places, None)

    async def list_tokens(self, pool: Pool, after: str = "", limit: int = MAX_COUNT) -> Sequence[PoolToken]:
        """List tokens ordered by value, starting after the value `after`."""
        return await self._store.pools.list_tokens(pool, self._clock(), after, limit)

    async def list_leases(self, pool: Pool, after: LeaseCursor, limit: int) -> Sequence[tuple[LeaseCursor, PoolToken]]:
        """List leased tokens ordered by the end of their lease, starting after a cursor."""
        return await self._store.pools.list_leases(pool, self._clock(), after, limit)

    def now(self) -> Instant:
        return self._clock()

    async def prefill(self) -> None:
        """Fill each pool with `prefill` or members to its capacity, once. This ends no lease.

        A pool that cannot be written is left for the next call: a server that only validates tokens must still start.
        """
        for pool in list(self._unfilled):
            try:
                await self._fill(pool)
                self._unfilled.remove(pool)
            except RetryLater as refusal:
                log.warning("pool_not_filled", pool=pool.name, reason=refusal.code)

    async def _fill(self, pool: Pool) -> None:
        await self._note_all_lapsed(pool, self._clock())
        first = missing = await self._store.pools.fit(pool, (), self._clock())
        while missing:
            await asyncio.sleep(_PAUSE)
            values = self._new_values(pool, max(0, min(missing, _FILL_BATCH)))
            missing = await self._store.pools.fit(pool, values, self._clock())
        if first > 0:
            log.info("pool_filled", pool=pool.name, capacity=pool.capacity)

    def _note_grant(self, pool: Pool, grant: Grant, asked_at: Instant) -> None:
        """Count and log what a request was granted."""
        granted_at = grant.request.granted_at or 0.0
        waited = max(0.0, granted_at - min(grant.request.since, asked_at))
        counters = self.counters[pool.name]
        if grant.request.number < LAST:
            counters.waited += 1
            counters.seconds_waited += waited
        for before, token in zip(grant.before, grant.tokens, strict=True):
            self._note_lease(pool, token, before.unlogged, waited)

    def _note_lease(self, pool: Pool, token: PoolToken, lapsed: PoolToken | None, waited: float = 0.0) -> None:
        """Count and log a lease, and the lapse of the one before."""
        counters = self.counters[pool.name]
        counters.granted += 1
        if lapsed is not None:
            self.log_lapse(pool, lapsed)
        if pool.log_leases:
            log.info("lease_granted", **_shown(pool, token), waited=round(waited, 3))

    @finished
    async def note_lapsed(self, pool: Pool, now: Instant, limit: int) -> int:
        """Count and log leases that have lapsed, and places in line, which are deleted: at most `limit` of each.

        Return `limit` if there may be more.
        """
        lapsed = await self._store.pools.note_lapsed(pool, self._lapses_since.get(pool.name, 0.0), now, limit)
        for token in lapsed.leases:
            self.log_lapse(pool, token)
        for place in lapsed.places:
            note_left(pool, place, place.kept_until)
        if len(lapsed.leases) < limit:
            self._lapses_since[pool.name] = now - _LATE
        if lapsed.places:
            self.waiting.wake(pool)
        return max(map(len, lapsed))

    async def _note_all_lapsed(self, pool: Pool, now: Instant) -> None:
        """Count and log what has lapsed, before tokens are deleted or extended: they do not show it afterwards."""
        while True:
            if await self.note_lapsed(pool, now, MAX_COUNT) < MAX_COUNT:
                return
            await asyncio.sleep(_PAUSE)

    def log_lapse(self, pool: Pool, token: PoolToken) -> None:
        """Count and log a lease that has lapsed."""
        held = token.free_at - (token.leased_at or token.free_at)
        self.counters[pool.name].lapsed += 1
        self.counters[pool.name].seconds_held += held
        log.info("lease_lapsed", **_shown(pool, token), held=round(held, 3), ended_at=int(token.free_at))

    def _note_release(self, pool: Pool, now: Instant, token: PoolToken) -> None:
        """Count and log a release."""
        counters = self.counters[pool.name]
        held = max(0.0, now - (token.leased_at or now))
        counters.released += 1
        counters.seconds_held += held
        if pool.log_leases:
            log.info("lease_released", **_shown(pool, token), held=round(held, 3))

    async def _require_lease(
        self, pool: Pool, change: LeaseChange | None, check: LeaseCheck, now: Instant
    ) -> PoolToken:
        """Return the changed token. Raises UnknownToken, NotYourLease or LeaseLost if the change was not granted."""
        try:
            return _require_granted(change, check, now)
        except (LeaseLost, NotYourLease):
            if change is not None and check.username is not None:
                end = await self._store.pools.find_forced_end(pool, change.before.value)
                if end is not None and end.was_of(check, change.before, now):
                    raise LeaseLost(_describe(end)) from None
            raise

    def _new_values(self, pool: Pool, count: int) -> list[str]:
        make = self._new_value.get(pool.name, values.new_value)
        return [make() for _ in range(count)]


async def _read_all(
    read: Callable[[tuple[Instant, int]], Awaitable[ListPart[T]]], start: tuple[Instant, int]
) -> Sequence[T]:
    found: list[T] = []
    cursor: tuple[Instant, int] | None = start
    while cursor is not None:
        part, _, cursor = await read(cursor)
        found += part
    return found


def _lists_from(
    after: ListCursor | None, pools: Sequence[Pool]
) -> Sequence[tuple[ListKind, Pool, tuple[Instant, int]]]:
    """Return the lists of leases, then the lines, from a cursor on, each with where it begins."""
    lists = [(kind, pool, start) for kind, start in STARTS.items() for pool in pools]
    if after is None:
        return lists
    for number, (kind, pool, _) in enumerate(lists):
        if (kind, pool.name) == (after.kind, after.pool):
            return [(kind, pool, after.cursor), *lists[number + 1 :]]
    raise InvalidRequest("after: must be the `next` of an earlier page.")


def check_name(name: str, field: str = "holder", longest: int = MAX_TEXT) -> str:
    """Return a name of 1 to `longest` visible characters. Raises InvalidRequest about `field` for any other."""
    if not 1 <= len(name) <= longest:
        raise InvalidRequest(f"{field}: must have 1 to {longest} characters.")
    if not is_visible(name):
        raise InvalidRequest(f"{field}: has an invisible character.")
    return name


def check_labels(pool: Pool, labels: Sequence[str], count: int = 1) -> None:
    """Raise InvalidRequest unless the pool can have `count` tokens with all of these labels."""
    matching = pool.matching(labels)
    if labels and matching == 0:
        raise InvalidRequest(
            "labels: no member of this pool has all of them."
            if pool.members
            else "labels: this pool has no members with labels."
        )
    if count > max(1, matching):
        raise InvalidRequest(f"count: is more than the pool has of these, {matching:.0f}.")


def check_label(text: str, field: str = "holder", longest: int = MAX_TEXT) -> str:
    """Return a text that others see. Raises InvalidRequest as `check_name` does, and if it has the form of a token."""
    values.refuse_value(text, field)
    return check_name(text, field, longest)


def _check_terms(pool: Pool, user: Identity, terms: LeaseTerms) -> None:
    """Raise InvalidRequest for terms that can never be granted, InsufficientScope for a priority that needs it."""
    if terms.id in {".", ".."}:
        raise InvalidRequest("request: must not be '.' or '..': many clients leave them out of a URL.")
    most = MAX_LEASES if pool.capacity is None else min(MAX_LEASES, pool.capacity)
    if not 1 <= terms.count <= most:
        raise InvalidRequest(f"count: must be from 1 to {most}." if most else "count: the pool has no tokens.")
    if not -MAX_PRIORITY <= terms.priority <= MAX_PRIORITY:
        raise InvalidRequest(f"priority: must be from -{MAX_PRIORITY} to {MAX_PRIORITY}.")
    if terms.priority > 0:
        user.require_scope(pool.manage_scope)
    if terms.wait is not None and not 0 <= terms.wait <= MAX_WAIT:
        raise InvalidRequest(f"wait: must be from 0 to {MAX_WAIT:.0f} seconds.")
    if pool.per_user is not None and terms.count > pool.per_user:
        raise InvalidRequest(f"count: is more than one user may lease, {pool.per_user}.")
    check_labels(pool, terms.labels, terms.count)


def _shown(pool: Pool, token: PoolToken) -> dict[str, object]:
    """Return what the log says of a lease: never the token."""
    named = {"member": token.member} if token.member is not None else {}
    return {"pool": pool.name, "user": token.username, "holder": token.holder, **named, "fence": token.fence}


def _require_granted(change: LeaseChange | None, check: LeaseCheck, now: Instant) -> PoolToken:
    """Return the changed token. Raises UnknownToken, NotYourLease or LeaseLost if the change was not granted."""
    if change is None:
        raise UnknownToken
    if change.granted:
        return change.token
    if change.token.is_leased(now) and not check.matches_user(change.token):
        raise NotYourLease
    raise LeaseLost


def _forced(
    pool: Pool, change: LeaseChange | None, now: Instant, by: str, reason: str | None, taken: bool
) -> LeaseChange:
    """Log whose lease was ended. Raises UnknownToken or LeaseLost if none was."""
    if change is None:
        raise UnknownToken
    if not change.granted:
        raise LeaseLost("The token is free, or under another lease than you named. No lease was ended.")
    held = round(max(0.0, now - (change.before.leased_at or now)), 3)
    log.info("lease_forced", **_shown(pool, change.before), held=held, by=by, reason=reason, taken=taken)
    return change


def _describe(end: ForcedEnd) -> str:
    """Tell the user of a lease who has ended it."""
    who = f"The manager {end.by!r}" if end.by else "A command on the server"
    reason = "" if end.reason is None else f" Reason: {end.reason}."
    return f"{who} has {'taken over' if end.taken else 'ended'} your lease.{reason}"


def _checked(value: str) -> str:
    # No token looks like this, so the database is not asked.
    if len(value) > MAX_TEXT or not value.isprintable():
        raise UnknownToken
    return value
