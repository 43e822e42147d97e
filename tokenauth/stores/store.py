"""The stores. The docstrings of their methods are the contract, which `tests/contract` checks on each database.

- Each method is one atomic step.
- Absence is an answer (None, False, 0, an empty list). StoreUnavailable means that the database cannot be used.
- A method that writes is durable when it returns.
- No text that is stored contains a NUL character.
- What depends on time takes `now`, in Unix seconds. A database that several machines share may use its own time.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any, Protocol, TypeVar

from sqlalchemy import BigInteger, Float, LargeBinary, Select, bindparam, func, select

from tokenauth.background import outlast
from tokenauth.clock import Clock
from tokenauth.errors import Refusal
from tokenauth.models import (
    ANY_LEASE,
    ID_BYTES,
    START_OF_LEASES,
    START_OF_LINE,
    Assignment,
    CountUpdate,
    Failures,
    ForcedEnd,
    Grant,
    Instant,
    Lapsed,
    LeaseChange,
    LeaseCheck,
    LeaseCursor,
    LeaseRequest,
    ListPart,
    Place,
    PlaceCursor,
    Pool,
    PoolCounts,
    PoolToken,
    RequestKey,
    Reservation,
    ShareUpdate,
    Token,
    TokenCursor,
    TokenKind,
    Use,
)
from tokenauth.stores.cache import TokenCache
from tokenauth.stores.changes import pool_rows, request_rows
from tokenauth.stores.changes.clock import AcquireDuty, SaveTime
from tokenauth.stores.changes.failures import PurgeFailures, RefundFailures, UpdateFailures
from tokenauth.stores.changes.forced_ends import ForceEnd
from tokenauth.stores.changes.named_tokens import IssueNamed, Rotate
from tokenauth.stores.changes.pools import (
    Assign,
    Delete,
    Fit,
    Generate,
    KeepAlive,
    KeepAliveFree,
    NoteLapsed,
    PurgePool,
    Release,
    ReleaseNext,
    Reserve,
)
from tokenauth.stores.changes.tokens import Issue, NoteUses, PurgeRevocations, PurgeTokens, Revoke, RevokeAll, Surplus
from tokenauth.stores.changes.waiting import Ask, HandOver, Leave, PutBack, TakeTurns
from tokenauth.stores.engine import Engine, OnClockAdvance, ignore_clock
from tokenauth.stores.schema import HEAD
from tokenauth.stores.sql import elements
from tokenauth.stores.tables import (
    as_lease_request,
    as_pool_token,
    as_token,
    forced_ends,
    pool_token_columns,
    pool_tokens,
    token_columns,
    tokens,
)
from tokenauth.waiting_line import Row, find_use, new_request, share_out, skip_hopeless

_STEP = 10_000
"""Tokens that one transaction revokes at most."""

_MAX_BRIEF_COUNT = 2000
"""A pool of at most this capacity is counted faster than a thread wakes up."""

_PAGE = 1000
"""Requests of a waiting line that are read at once."""

LOOK = 1000
"""Leases or requests that are looked at in one step."""

_LAST_NUMBER = 2**63 - 1
"""No row has a greater number."""

_MAX_BRIEF_MEMBERS = 20
"""A pool of at most this many members is read faster than a thread wakes up."""

_FIND = select(*token_columns).where(tokens.c.digest.between(bindparam("low"), bindparam("high")))
_LIST = (
    select(*token_columns)
    .where(tokens.c.expires_at > bindparam("now", type_=Float()))
    .order_by(tokens.c.number.desc())
    .limit(bindparam("limit"))
)
_LISTS: Mapping[TokenKind | None, Select[Any]] = {
    None: _LIST,
    "login": _LIST.where(tokens.c.name.is_(None)),
    "named": _LIST.where(tokens.c.name.is_not(None)),
}
_LISTS_OF_USER = {kind: listed.where(tokens.c.username == bindparam("username")) for kind, listed in _LISTS.items()}
_end, _low = bindparam("end", type_=BigInteger()), bindparam("low", type_=LargeBinary())
_LIST_BY_END = (
    select(*token_columns)
    .where(tokens.c.expires_at > bindparam("now", type_=Float()), tokens.c.expires_at <= _end)
    .where((tokens.c.expires_at < _end) | (tokens.c.digest < _low))
    .order_by(tokens.c.expires_at.desc(), tokens.c.digest.desc())
    .limit(bindparam("limit"))
)
_FINGERPRINTS = (
    select(tokens.c.username, func.count(), func.max(tokens.c.number))
    .where(
        tokens.c.username.in_(select(elements(bindparam("usernames"), "wanted").c.value)),
        tokens.c.expires_at > bindparam("now", type_=Float()),
    )
    .group_by(tokens.c.username)
)
_LAST_EXPIRY = select(func.max(tokens.c.expires_at))
_COUNT_EXPIRING = select(func.count()).select_from(
    select(tokens.c.expires_at)
    .where(tokens.c.expires_at >= bindparam("start"), tokens.c.expires_at < bindparam("end"))
    .limit(bindparam("limit"))
    .subquery()
)
_POOL_TOKEN = select(*pool_token_columns).where(
    pool_tokens.c.pool == bindparam("pool"), pool_tokens.c.value == bindparam("value")
)
_FORCED_END = select(forced_ends.c.end).where(
    forced_ends.c.pool == bindparam("pool"), forced_ends.c.value == bindparam("value")
)


Fingerprint = tuple[object, ...]
"""A value that is compared with earlier ones."""


T = TypeVar("T")


def _in_context(on_commit: Callable[[T], object]) -> Callable[[T], object]:
    """Let what is logged there name the request that is handled now."""
    context = copy_context()
    return lambda answer: context.run(on_commit, answer)


def _with_own(on_commit: Callable[[Sequence[bytes]], object], surplus: Surplus) -> None:
    on_commit(surplus.own)


class Share(Protocol):
    """Has the other workers of this machine call `forget`, or `forget_missing`, and waits until they have."""

    async def __call__(self, digests: Collection[bytes] | None, missing: bool = False) -> None:
        """`digests` None: it is not known which. `missing`: the store does not have them."""


class TokenStore:
    """Tokens by the digest of their value."""

    def __init__(self, engine: Engine, cache: TokenCache) -> None:
        self._engine = engine
        self._cache = cache
        self.cached = cache.cached
        """Returns what `get` returns without waiting; None for what must be looked up, as `look_up` does."""
        self.look_up = cache.look_up
        self.has_now = cache.has_now
        self.look_up_now = cache.look_up_now
        self.share: Share | None = None
        """Reaches the other workers of this machine; None if there are none."""

    def forget(self, digests: Collection[bytes] | None) -> None:
        """Never return tokens again that another process has revoked; None: which tokens is not known."""
        if digests is None:
            self._engine.feed.invalidate()
        else:
            self._engine.feed.add(digests)

    async def _revoked(self, digests: Collection[bytes] | None) -> None:
        """Make sure that no process of this machine returns tokens that this one has revoked."""
        self.forget(digests)
        if self.share is not None and not self._engine.feed.sees_commits and (digests is None or digests):
            await self.share(digests)

    def forget_missing(self, digests: Collection[bytes]) -> None:
        """Never return tokens again that the store did not have when another process looked."""
        self._cache.forget(digests)

    async def share_missing(self, digest: bytes) -> None:
        """After `get` has returned None: make sure that no process of this machine returns the token either."""
        if self.share is not None and not self._engine.feed.sees_commits:
            await self.share((digest,), missing=True)

    async def issue(
        self, token: Token, per_user: int, now: Instant, on_commit: Callable[[Sequence[bytes]], object] | None = None
    ) -> Sequence[bytes]:
        """Store a token. If its user then has more than `per_user` live ones, revoke the oldest; 0 means no limit.

        Returns the digests of those that were revoked, except what another login at the same time has returned.
        `on_commit` is called with them first, also if the caller is cancelled meanwhile.
        """
        with_own = on_commit and _in_context(partial(_with_own, on_commit))
        surplus = await self._engine.apply(Issue(token, per_user, now=now, on_commit=with_own))
        await self._revoked(surplus.digests)
        return surplus.own

    async def issue_named(
        self, token: Token, credentials: Collection[str], limit: int, now: Instant, by: bytes | None = None
    ) -> Refusal | None:
        """Store a named token, unless its user has a live one of the same name, or `limit` names.

        Returns why it was not stored: NameTaken, TooManyTokens, or InvalidToken if the login `by` was revoked. A token
        with none of `credentials` is not live.
        """
        return await self._engine.apply(IssueNamed(token, credentials, limit, by, now=now))

    async def rotate(
        self,
        digest: bytes,
        successor: Token,
        credentials: Collection[str],
        ends_at: int,
        now: Instant,
        by: bytes | None = None,
    ) -> Refusal | None:
        """Store the successor of a live named token, and end that token at `ends_at`, unless it ends before.

        Returns why nothing was changed: InvalidToken if the login `by` was revoked, UnknownToken, AlreadyRotated if it
        had a successor, or TooManyTokens if too many rotated tokens of its name are live. An `ends_at` that is not
        after `now` revokes it.
        After this returns, no `get` of any process returns the token with a later end.
        """
        refusal = await self._engine.apply(Rotate(digest, successor, credentials, ends_at, by, now=now))
        await self._revoked((digest,))
        return refusal

    async def get(self, digest: bytes) -> Token | None:
        """Return the token with this digest, live or expired, unless it was revoked.

        It has no `address` and no `user_agent`: those are only in what `find` and the lists return.
        """
        return self.cached(digest) or await self.look_up(digest)

    async def get_current(self, digest: bytes) -> Token | None:
        """Return the token with this digest as the store has it now: another process may have extended it."""
        self._cache.cached(digest)  # applies the revocations that are known
        return await self._cache.look_up(digest)

    async def note_uses(self, uses: Sequence[Use], now: Instant) -> Mapping[bytes, Token]:
        """Write uses of tokens. Return these tokens as they are now, by their digests.

        A use never shortens a token, and extends none that was revoked, or that ended long before `now`. A use may not
        be written while other processes write the same token: then the token that is returned shows that.
        """
        generation = self._cache.generation
        found = await self._engine.apply(NoteUses(uses, now=now))
        self._cache.replace([use.digest for use in uses], found, generation)
        return found

    async def find(self, id: str) -> Token | None:
        """Return the token with this public id, live or expired, unless it was revoked."""
        try:
            low = bytes.fromhex(id)
        except ValueError:
            return None
        if len(low) != ID_BYTES or low.hex() != id:
            return None
        rows = await self._engine.read(_FIND, {"low": low, "high": low + b"\xff" * (32 - ID_BYTES)})
        return as_token(rows[0]) if rows else None

    async def revoke(self, digest: bytes, now: Instant, on_commit: Callable[[bool], object] | None = None) -> bool:
        """Revoke a token; False if there was none. After this returns, no `get` of any process returns it.

        `on_commit` is called with the same first, also if the caller is cancelled meanwhile.
        """
        existed = await self._engine.apply(Revoke(digest, now=now, on_commit=on_commit and _in_context(on_commit)))
        await self._revoked((digest,))  # also if another process revoked it, and its notification has not arrived
        return existed

    async def revoke_all(
        self,
        username: str | None,
        now: Instant,
        keep: bytes | None = None,
        kind: TokenKind | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Revoke all live tokens of a user, or of all users, except the digest `keep`; return how many.

        `kind`: only tokens of this kind. `progress` is called after each step with the number so far. When this is
        cancelled, it ends after the step that is under way.
        """
        total, more = 0, True
        try:
            while more:  # in steps, between which others write
                step, cancelled = await outlast(self._engine.apply(RevokeAll(username, keep, _STEP, kind, now=now)))
                if cancelled and step.exception() is not None:
                    raise asyncio.CancelledError
                revoked = step.result()
                total += revoked.live
                more = _STEP in {revoked.live, revoked.lapsed}
                if progress is not None:
                    progress(total)
                if cancelled:
                    raise asyncio.CancelledError
        finally:
            await self._revoked(None)
        return total

    async def list(
        self, username: str | None, now: Instant, limit: int, kind: TokenKind | None = None
    ) -> Sequence[Token]:
        """Return the live tokens of a user, or of all users, newest first, at most `limit`.

        `kind`: only tokens of this kind.
        """
        values = {"now": now, "limit": limit}
        if username is None:
            rows = await self._engine.read(_LISTS[kind], values)
        else:
            rows = await self._engine.read(_LISTS_OF_USER[kind], {**values, "username": username})
        return [as_token(row) for row in rows]

    async def list_by_end(self, before: TokenCursor, now: Instant, limit: int) -> Sequence[Token]:
        """Return live tokens of all users, the latest end first, at most `limit`, that come after a cursor.

        Those that end in the same second as one of them are read, too.
        """
        end, id = before
        rows = await self._engine.read(_LIST_BY_END, {"end": end, "low": id, "now": now, "limit": limit})
        return [as_token(row) for row in rows]

    async def fingerprints(self, usernames: Collection[str], now: Instant) -> Mapping[str, Fingerprint]:
        """Return for each user who has live tokens a value that differs once a token was added, or has ended."""
        values = {"usernames": json.dumps([*usernames]), "now": now}
        return {row[0]: (*row[1:],) for row in await self._engine.read(_FINGERPRINTS, values)}

    async def count_expiring(self, start: Instant, end: Instant, limit: int) -> int:
        """Return how many tokens expire from `start` on and before `end`, at most `limit`."""
        rows = await self._engine.read(_COUNT_EXPIRING, {"start": start, "end": end, "limit": limit})
        return int(rows[0][0])

    async def last_expiry(self) -> Instant:
        """Return when the last token expires; 0 if there is none."""
        rows = await self._engine.read(_LAST_EXPIRY, {})
        return rows[0][0] or 0

    async def purge(self, now: Instant, limit: int) -> int:
        """Delete at most `limit` expired tokens, the oldest first; return how many."""
        return await self._engine.apply(PurgeTokens(limit, now=now))


class PoolStore:
    """Pool tokens by pool and value. An expired token does not exist, even while its row does.

    Values and holder names are printable text, and no value is used twice.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def generate(self, pool: Pool, values: Sequence[str], now: Instant) -> bool:
        """Add free tokens; False, and none is added, if the pool would exceed its capacity."""
        return await self._engine.apply(Generate(pool, values, now=now))

    async def fit(self, pool: Pool, values: Sequence[str], now: Instant) -> int:
        """Bring a pool with `prefill` or members closer to its capacity, in one batch.

        Returns 0 when the pool fits, a number n > 0 if it needs n more values, and -n if n surplus tokens are left for
        the next batches. As many of `values` are added as are missing. Surplus free tokens are deleted. Surplus leased
        tokens are retired: they are deleted when their lease ends, and until then one free token is withheld for each.

        A pool with members gets a token for each name, and loses tokens without a name. A member that the settings do
        not have is retired, also while it is free, and nothing is withheld for it. It is reinstated when its name
        returns, with its value and its fence.
        """
        return await self._engine.apply(Fit(pool, values, now=now))

    async def assign(
        self,
        pool: Pool,
        holder: str,
        now: Instant,
        username: str | None = None,
        counted: bool = False,
        ttl: float | None = None,
        labels: Sequence[str] = (),
    ) -> Assignment:
        """Lease the token that has been free longest to `holder`. `counted`: also return how many are left.

        ttl: seconds that the lease lasts, instead of those of the pool.
        labels: lease a member that has all of these. A member that is reserved for the user comes first.
        """
        return await self._engine.apply(Assign(pool, holder, username, counted, ttl, labels, now=now))

    async def keep_alive(
        self, pool: Pool, value: str, now: Instant, check: LeaseCheck = ANY_LEASE, include_free: bool = False
    ) -> LeaseChange | None:
        """Extend a lease to its full time from now if the check matches it; None if there is no such token.

        `include_free`: the life of a free token is extended to its full time from now. One that is still to be
        reclaimed stays as it is.
        """
        return await self._engine.apply(KeepAlive(pool, value, check, include_free, now=now))

    async def keep_alive_free(self, pool: Pool, before: Instant, now: Instant, limit: int) -> int:
        """Extend the life of at most `limit` tokens that have been free since before an instant; return how many."""
        return await self._engine.apply(KeepAliveFree(pool, before, limit, now=now))

    async def release(self, pool: Pool, value: str, now: Instant, check: LeaseCheck = ANY_LEASE) -> LeaseChange | None:
        """End a lease if the check matches it; the token is free from now on. None if there is no such token."""
        return await self._engine.apply(Release(pool, value, check, now=now))

    async def force_end(
        self,
        pool: Pool,
        value: str,
        now: Instant,
        by: str,
        reason: str | None = None,
        check: LeaseCheck = ANY_LEASE,
        holder: str | None = None,
    ) -> LeaseChange | None:
        """End a lease if the check matches it, and keep who did it and why. None if there is no such token.

        With a `holder`, lease the token to the user `by` in the same step.
        """
        return await self._engine.apply(ForceEnd(pool, value, check, by, reason, holder, now=now))

    async def find_forced_end(self, pool: Pool, value: str) -> ForcedEnd | None:
        """Return how a manager has ended a lease of a token: the last one that was ended so, for a day at least."""
        rows = await self._engine.read(_FORCED_END, {"pool": pool.name, "value": value}, brief=True)
        return ForcedEnd(*json.loads(rows[0][0])) if rows else None

    async def ask(
        self,
        pool: Pool,
        username: str,
        id: str | None,
        holder: str,
        now: Instant,
        count: int = 1,
        priority: int = 0,
        ttl: float | None = None,
        labels: tuple[str, ...] = (),
        keep: float | None = None,
        known: bool = False,
    ) -> Grant | LeaseRequest | Refusal:
        """Lease `count` tokens, all or none, to a request if it is its turn; otherwise it waits, or is refused.

        Requests are served in the order of `tokenauth.waiting_line`. One that waits keeps its place for `keep` seconds,
        and as long again when it is asked for again; without `keep` it gets none, and NoFreeToken is returned. A
        request that was granted and is asked for again has the same leases. Then LeaseLost is returned if one of them
        is over. RequestDiffers is returned if the terms are others, and TooManyPlaces if the user has MAX_PLACES.
        Without an `id` it cannot wait, nor be asked for again. With `known`, nothing is leased: PlaceLost is returned
        if nothing was granted to the request before.
        """
        wanted = count, priority, ttl, labels
        return await self._engine.apply(Ask(pool, username, id, holder, *wanted, keep, known, now=now))

    async def take_turns(self, pool: Pool, asks: Mapping[RequestKey, int], now: Instant) -> Sequence[Grant]:
        """Serve those of some waiting requests whose turn it is, and which were not asked for more often than given."""
        return await self._engine.apply(TakeTurns(pool, asks, now=now))

    async def hand_over(
        self, pool: Pool, value: str, asks: Mapping[RequestKey, int], now: Instant, check: LeaseCheck = ANY_LEASE
    ) -> tuple[LeaseChange | None, Sequence[Grant]]:
        """End a lease as `release` does, and in the same step serve waiting requests as `take_turns` does.

        Nobody is served if no lease was ended.
        """
        return await self._engine.apply(HandOver(pool, value, check, asks, now=now))

    async def lost_places(self, pool: Pool, asks: Mapping[RequestKey, int], now: Instant) -> Collection[RequestKey]:
        """Return which of some requests `take_turns` will not serve: not waiting any more, or asked for once more."""
        ids = json.dumps([id for _, id in asks])
        rows = await self._engine.read(request_rows.WAITS_STILL, {"name": pool.name, "now": now, "ids": ids})
        kept = {(username, id): count for username, id, count in rows}
        return [key for key, count in asks.items() if kept.get(key) != count]

    async def may_have_turn(self, pool: Pool, asks: Mapping[RequestKey, int], now: Instant) -> bool:
        """Return whether `take_turns` could serve a request, from what was committed when this was called."""
        if pool.is_selective:
            return await self._may_be_served(pool, asks, now)
        values = pool_rows.parameters(pool, now)
        [(free,)] = await self._engine.read(pool_rows.SOME_FREE, values, brief=True)
        if free <= 0:
            return False
        place = START_OF_LINE
        while True:
            first = {"name": pool.name, "now": now, **request_rows.beyond(place), "limit": free}
            limit, page = free, [*map(as_lease_request, await self._engine.read(request_rows.LINE, first, brief=True))]
            for request in skip_hopeless(pool, page):
                free -= request.count
                if free < 0:
                    return False
                if asks.get(request.key) == request.asks:
                    return True
            if len(page) < limit or free == 0:
                return False
            place = page[-1].cursor

    async def _may_be_served(self, pool: Pool, asks: Mapping[RequestKey, int], now: Instant) -> bool:
        """Share the free tokens out as `take_turns` does, and return whether a request would get some."""
        values = pool_rows.parameters(pool, now)
        if pool.members:
            free = pool_rows.free_members(pool, await self._members(pool, now), now)
        else:
            [(count,)] = await self._engine.read(pool_rows.SOME_FREE, values, brief=True)
            free = [(number, PoolToken(pool.name, "", now)) for number in range(count)]
        if not free:
            return False
        quotas: dict[str, int] | None = None
        if pool.per_user is not None:
            quotas = defaultdict(lambda: pool.per_user or 0)
            for username, held in await self._engine.read(pool_rows.HELD, values):
                quotas[username] -= held
        may_use = find_use(pool, now)
        # Most often nobody can use what is free, and the line is long.
        personal = quotas is not None or any(pool.reservation(token, now) for _, token in free)
        kinds = await self._engine.read(request_rows.LABELS_BY_USER if personal else request_rows.LABELS, values)
        one_each = (
            new_request(pool, "".join(user), "", "", labels=tuple(json.loads(labels))) for labels, *user in kinds
        )
        if next(share_out(one_each, free, may_use, None if quotas is None else quotas.copy()), None) is None:
            return False
        line: list[LeaseRequest] = []
        place = START_OF_LINE
        more = True
        while more:
            page = await self.list_requests(pool, now, _PAGE, place)
            line += page
            more = len(page) == _PAGE
            place = page[-1].cursor if more else place
        served = share_out(skip_hopeless(pool, line), free, may_use, quotas)
        return any(asks.get(request.key) == request.asks for request, _ in served)

    async def leave(
        self,
        pool: Pool,
        key: RequestKey,
        now: Instant,
        keep: float | None = None,
        seen: LeaseRequest | None = None,
    ) -> LeaseRequest | None:
        """Give up a place in the line, or keep it for at most `keep` seconds more; None if there is none.

        seen: the request when it was last asked for here; it keeps its place if it was asked for again since, anywhere.
        """
        return await self._engine.apply(Leave(pool, key, keep, seen, now=now))

    async def put_back(self, pool: Pool, request: LeaseRequest, keep: float | None, now: Instant) -> bool:
        """End the leases of a request whose client has gone, unless another answer has them too.

        With `keep` the request gets its place back, for that many seconds. Returns whether it was undone.
        """
        return await self._engine.apply(PutBack(pool, request, keep, now=now))

    async def note_lapsed(self, pool: Pool, since: Instant, now: Instant, limit: int) -> Lapsed:
        """Note what lapsed, each once: leases whose end was at `since` or later, and places, which are deleted.

        At most `limit` of each. A lease that is noted here is not when its token is leased again.
        """
        values = {**pool_rows.parameters(pool, now), "since": since, "limit": 1}
        first = await self._engine.read(pool_rows.UNLOGGED, values)  # it may look at many rows, so it locks none
        if not first and not await self._engine.read(request_rows.LAPSED, values):
            return Lapsed((), ())
        start = min((as_pool_token(row[1:]).free_at for row in first), default=now)
        return await self._engine.apply(NoteLapsed(pool, start, limit, now=now))

    async def find_place(self, pool: Pool, key: RequestKey, now: Instant) -> Place | None:
        """Return the place of a request in the line; None if it does not wait."""
        values: dict[str, object] = {"name": pool.name, "now": now}
        rows = await self._engine.read(request_rows.FIND, {**values, "username": key[0], "id": key[1]}, brief=True)
        if not rows:
            return None
        request = as_lease_request(rows[0])
        if request.granted_at is not None or request.kept_until <= now:
            return None
        return await self.count_line(pool, request.cursor, now, brief=True)

    async def count_line(self, pool: Pool, until: PlaceCursor, now: Instant, brief: bool = False) -> Place:
        """Return how many requests wait, up to a cursor and in all."""
        values = {"name": pool.name, "now": now, **request_rows.beyond(until)}
        [(position, waiting)] = await self._engine.read(request_rows.PLACE, values, brief)
        return Place(position, waiting)

    async def count_requests(self, pool: Pool, now: Instant) -> int:
        """Return how many requests wait."""
        rows = await self._engine.read(request_rows.COUNT, {"name": pool.name, "now": now}, brief=True)
        return int(rows[0][0])

    async def list_requests(
        self, pool: Pool, now: Instant, limit: int, after: PlaceCursor = START_OF_LINE
    ) -> Sequence[LeaseRequest]:
        """Return the requests that wait, in order, at most `limit`, after a cursor."""
        values = {"name": pool.name, "now": now, **request_rows.beyond(after), "limit": limit}
        return [as_lease_request(row) for row in await self._engine.read(request_rows.LINE, values)]

    async def list_leases_of(
        self, pool: Pool, username: str, now: Instant, after: LeaseCursor = START_OF_LEASES
    ) -> ListPart[PoolToken]:
        """Look at the next LOOK leases, ordered by their end, for those of a user."""
        page = await self.list_leases(pool, now, after, LOOK)
        found = [token for _, token in page if token.username == username]
        return ListPart(found, len(page), page[-1][0] if len(page) == LOOK else None)

    async def list_places_of(
        self, pool: Pool, username: str, now: Instant, after: PlaceCursor = START_OF_LINE
    ) -> ListPart[tuple[LeaseRequest, Place]]:
        """Look at the next LOOK requests that wait, in order, for those of a user."""
        before, waiting = await self.count_line(pool, after, now)
        page = await self.list_requests(pool, now, LOOK, after) if waiting > before else ()
        numbered = ((request, Place(number, waiting)) for number, request in enumerate(page, before + 1))
        found = [(request, place) for request, place in numbered if request.username == username]
        return ListPart(found, len(page), page[-1].cursor if len(page) == LOOK else None)

    async def release_next(self, pool: Pool, now: Instant, username: str | None = None) -> tuple[bool, int]:
        """End the lease that would end first, of a user or of all users; False if there is none.

        The number is how many tokens can then be leased, by anyone.
        """
        return await self._engine.apply(ReleaseNext(pool, username, now=now))

    async def delete(self, pool: Pool, value: str, now: Instant, successor: str | None = None) -> PoolToken | None:
        """Delete a token, free or leased, and return it; None if there was none.

        A `successor` replaces it, free from now on.
        """
        return await self._engine.apply(Delete(pool, value, successor, now=now))

    async def reserve(
        self, pool: Pool, member: str, reservation: Reservation | None, now: Instant, replace: bool = False
    ) -> LeaseChange | None:
        """Reserve a member, or end its reservation (None); None if there is no such member.

        Refused if someone else has reserved it, unless `replace`. A lease goes on, and the reservation applies when it
        is over.
        """
        return await self._engine.apply(Reserve(pool, member, reservation, replace, now=now))

    async def members(self, pool: Pool, now: Instant) -> Sequence[PoolToken]:
        """Return the members of a pool: those in its settings, and retired ones that are still leased."""
        return [
            token
            for _, token in await self._members(pool, now)
            if token.is_leased(now) or (not token.retired and token.member in pool.members)
        ]

    async def _members(self, pool: Pool, now: Instant) -> Sequence[Row]:
        brief = len(pool.members) <= _MAX_BRIEF_MEMBERS
        rows = await self._engine.read(pool_rows.NAMED, pool_rows.parameters(pool, now), brief)
        return [(row[0], as_pool_token(row[1:])) for row in rows]

    async def get(self, pool: Pool, value: str, now: Instant) -> PoolToken | None:
        """Return the token with this value."""
        rows = await self._engine.read(_POOL_TOKEN, {"pool": pool.name, "value": value}, brief=True)
        token = as_pool_token(rows[0]) if rows else None
        return token if token is not None and pool.is_live(token, now) else None

    async def count(self, pool: Pool, now: Instant) -> PoolCounts:
        """Return how many tokens can be leased, by anyone, and how many are."""
        if pool.members:
            return PoolCounts(*pool.count(await self.members(pool, now), now)[:2])
        brief = pool.capacity is not None and pool.capacity <= _MAX_BRIEF_COUNT
        rows = await self._engine.read(pool_rows.COUNT, pool_rows.parameters(pool, now), brief)
        return pool_rows.as_pool_counts(*rows[0])

    async def list_tokens(self, pool: Pool, now: Instant, after: str, limit: int) -> Sequence[PoolToken]:
        """Return tokens ordered by value, at most `limit`, from the first value after `after`."""
        behind = after.partition("\0")[0]  # no value has a NUL, so none lies between the two
        values = {**pool_rows.parameters(pool, now), "after": behind, "limit": limit}
        return [as_pool_token(row) for row in await self._engine.read(pool_rows.MEMBERS, values)]

    async def list_leases(
        self, pool: Pool, now: Instant, after: LeaseCursor, limit: int
    ) -> Sequence[tuple[LeaseCursor, PoolToken]]:
        """Return at most `limit` leased tokens and their cursors, ordered by the end of their lease, after a cursor."""
        end, number = max(after, (now, _LAST_NUMBER))  # a lease that ends now has ended
        values = {**pool_rows.parameters(pool, now), "end": end, "number": number, "limit": limit}
        rows = await self._engine.read(pool_rows.LEASES, values)
        return [((token.free_at, row[0]), token) for row in rows for token in [as_pool_token(row[1:])]]

    async def fingerprint(self, pool: Pool, now: Instant) -> Fingerprint:
        """Return a value that differs once leases, the waiting line or reservations of a pool have changed.

        Rarely it does not, as after a lease for a shorter time than others, if there was no free token that was free
        longest.
        """
        values = pool_rows.parameters(pool, now)
        [ends] = await self._engine.read(pool_rows.ENDS, values, brief=True)
        [line] = await self._engine.read(request_rows.NEWEST, {"name": pool.name, "now": now}, brief=True)
        if not pool.members:
            return (*ends, *line)
        members = (
            (token.member, token.fence, token.is_leased(now), token.retired, pool.reservation(token, now))
            for _, token in await self._members(pool, now)
        )
        return (*ends, *line, *members)

    async def purge(self, pool: Pool, now: Instant, limit: int) -> int:
        """Delete at most `limit` expired tokens, the oldest first; return how many."""
        return await self._engine.apply(PurgePool(pool, limit, now=now))


class FailureStore:
    """Counts of failed logins by key. A key does not reveal whose count it is."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def get(self, keys: Sequence[bytes]) -> Mapping[bytes, Failures]:
        """Return what is stored under these keys; missing keys are left out."""
        return await self._engine.failures(keys)

    async def update(self, updates: Sequence[CountUpdate], now: Instant, shares: Sequence[ShareUpdate] = ()) -> None:
        """Make all of these updates in one step. No key may appear twice.

        shares: shares of buckets that exist, or that `updates` create.
        """
        await self._engine.apply(UpdateFailures(updates, shares, now=now))

    async def refund(
        self, own: bytes, streak: bytes | None, shares: Sequence[tuple[bytes, bytes]], cutoff: Instant, now: Instant
    ) -> None:
        """Remove the failures that precede a successful login. What was refunded once is not refunded again.

        own: key of the failures in a row of the name at the location. Its count becomes 0. It counts as 0 already if it
        was last changed at or before `cutoff`.
        streak: key of the failures in a row of the name in its network. Its count falls by what `own` had: 3 failures
        in `own` and 5 in `streak` become 0 and 2.
        shares: pairs of keys, of the share of a bucket and of the bucket. The bucket loses what the share still holds,
        and the share becomes empty. It holds nothing if the bucket was cleared since.
        """
        await self._engine.apply(RefundFailures(own, streak, shares, cutoff, now=now))

    async def purge(self, before: Instant, limit: int) -> int:
        """Delete at most `limit` keys whose instant is before this one; return how many."""
        return await self._engine.apply(PurgeFailures(before, limit))


class Store:
    """All data of the service in one database, and how to start and stop using it."""

    def __init__(self, engine: Engine, cache_size: int) -> None:
        """`cache_size` is how many tokens this process caches."""
        self.engine = engine
        self.tokens = TokenStore(engine, TokenCache(engine.token, engine.feed, cache_size, engine.token_now))
        self.pools = PoolStore(engine)
        self.failures = FailureStore(engine)

    @property
    def clock(self) -> Clock:
        """The clock that all users of this store share."""
        return self.engine.clock

    async def start(self, on_clock_advance: OnClockAdvance = ignore_clock) -> Instant:
        """Migrate the schema, connect, and return the latest `now` that any process has written.

        After that, and not before, `on_clock_advance` is called with later times soon after other processes have
        written them, so that the caller can compare its own clock with the answer. Raises StartError if the schema is
        newer than this release or the database cannot be used.
        """
        return await self.engine.start(on_clock_advance)

    async def stop(self, now: Instant) -> None:
        """Finish what is being written, write `now`, and disconnect."""
        await self.engine.stop(now)

    async def save_time(self, now: Instant) -> None:
        """Save `now` for all processes that use this store, so that their time does not go back after a restart."""
        await self.engine.apply(SaveTime(now=now))

    @property
    def schema(self) -> str:
        """The version of the schema that this release needs."""
        return HEAD

    @property
    def identity(self) -> str:
        """Differs from that of another database at the same address; DATABASE_LOST after the open one was replaced."""
        return self.engine.identity

    @property
    def feed_age(self) -> float:
        """Seconds since this process knew all revocations of all processes; 0 if it looks before each answer."""
        return self.engine.feed.age()

    async def ready(self) -> str | None:
        """Return why the store cannot serve, or None."""
        return await self.engine.ready()

    async def acquire_duty(self, duty: str, now: Instant, until: Instant) -> bool:
        """Reserve a periodic task for this process until an instant; False if another process has it."""
        return await self.engine.apply(AcquireDuty(duty, until, now=now))

    async def purge_revocations(self, before: Instant, limit: int) -> int:
        """Delete at most `limit` entries of the revocation log older than an instant; return how many."""
        return await self.engine.apply(PurgeRevocations(before, limit))
