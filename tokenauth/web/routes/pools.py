"""/api/pools: generate, assign, keep alive, release, delete, and what there is. All behind TokenMiddleware."""

import re
from collections.abc import Sequence
from typing import Annotated

import msgspec
from starlette.types import Receive, Scope, Send

from tokenauth.errors import (
    InsufficientScope,
    InvalidRequest,
    LeaseLost,
    NoFreeToken,
    NotYourLease,
    PoolFull,
    UnknownPool,
    UnknownToken,
)
from tokenauth.models import START_OF_LEASES, Identity, LeaseCheck, LeaseCursor, Pool, PoolToken
from tokenauth.pools import MAX_COUNT, MAX_TEXT, Pools, check_name
from tokenauth.web import requests
from tokenauth.web.operations import JSON_BODY, Answer, Refusals, operation, said
from tokenauth.web.responses import answer, answer_json
from tokenauth.web.routing import Handlers

PAGE = 100
"""Tokens on a page, unless `?limit=` says otherwise."""


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    """How many tokens are to be made."""

    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)] = 1


class Borrower(msgspec.Struct, forbid_unknown_fields=True):
    """Who is to have the token; the user, if it is not said."""

    holder: Annotated[str, said(minLength=1, maxLength=MAX_TEXT, description="Printable.")] | None = None


class Claimed(msgspec.Struct, forbid_unknown_fields=True):
    """What the caller knows of the lease that it says it has; what is left out is not compared."""

    holder: str | None = None
    fence: int | None = None


class Ended(Claimed):
    """What the caller knows of the lease that it ends, and why a manager ends another user's: that is logged."""

    reason: Annotated[str, said(minLength=1, maxLength=MAX_TEXT, description="Printable.")] | None = None


class Counted(msgspec.Struct):
    """How many tokens of a pool can be lent, and how many are; no capacity is any number."""

    name: str
    capacity: int | None
    available: int
    leased: int


class Member(msgspec.Struct, omit_defaults=True):
    """A token of a pool, and its lease. `token` is left out of other users' leases. Times are Unix seconds."""

    token: str | msgspec.UnsetType
    expiry_time: int | None
    user: str | msgspec.UnsetType | None = msgspec.UNSET
    holder: str | msgspec.UnsetType = msgspec.UNSET
    fence: int | msgspec.UnsetType = msgspec.UNSET
    lease_expiry_time: int | msgspec.UnsetType = msgspec.UNSET


class Leased(msgspec.Struct):
    """A token that is lent: until when, and for how many seconds from now; `fence` grows with each lease of it."""

    token: str
    holder: str
    fence: int
    expiry_time: int
    expires_in: int


class Listing(msgspec.Struct):
    """All pools that the user may use."""

    pools: list[Counted]


class Page(Counted):
    """A pool, and some of its tokens; the next page begins `?after=` the last of them, if `next` is one."""

    tokens: list[Member]
    next: str | None


class Generated(msgspec.Struct):
    """Tokens that were made."""

    tokens: list[str]


_wanted = msgspec.json.Decoder(Wanted)
_holder = msgspec.json.Decoder(Borrower)
_claimed = msgspec.json.Decoder(Claimed)
_ended = msgspec.json.Decoder(Ended)


_PLACE = re.compile(r"(\d{1,17}\.\d{1,17})-(\d{1,18})", re.ASCII)
_Limit = Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)]
_POOL: Refusals = (UnknownPool, InsufficientScope)
_TOKEN: Refusals = (*_POOL, UnknownToken)
_LEASE: Refusals = (*_TOKEN, *JSON_BODY, LeaseLost, NotYourLease)


class PoolRoutes:
    """The handlers, and the addresses that they answer at."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def routes(self) -> dict[str, Handlers]:
        """List the addresses."""
        one = "/api/pools/{pool}"
        return {
            "/api/pools": {"GET": self.list},
            one: {"GET": self.show},
            f"{one}/tokens": {"POST": self.generate},
            f"{one}/tokens/{{token}}": {"GET": self.show_token, "DELETE": self.delete},
            f"{one}/leases": {"POST": self.assign},
            f"{one}/leases/{{token}}": {"PUT": self.keep_alive, "DELETE": self.release},
        }

    @operation(Answer(200, Listing))
    async def list(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Say how many tokens each pool has."""
        counted = [await self._counted(pool) for pool in self._pools.usable_by(scope["user"])]
        await answer_json(send, Listing(counted))

    @operation(Answer(200, Page), refuses=_POOL, query={"after": str, "limit": _Limit})
    async def show(self, scope: Scope, receive: Receive, send: Send) -> None:
        """List the tokens of a pool, page by page: all of them to who manages it, the leased ones to others."""
        pool, user = self._pool(scope), scope["user"]
        limit = requests.query_number(scope, "limit", PAGE, 1, MAX_COUNT)
        after = requests.query_value(scope, "after") or ""
        page, following = await (self._all if pool.managed_by(user) else self._leases)(pool, after, limit)
        available, leased = await self._pools.count(pool)
        members = [self._member(pool, token, user) for token in page]
        await answer_json(send, Page(pool.name, pool.capacity, available, leased, members, following))

    @operation(Answer(201, Generated), body=Wanted, empty=True, refuses=(*_POOL, *JSON_BODY, PoolFull))
    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add tokens."""
        pool = self._managed(scope)
        wanted = await requests.json_body(scope, receive, _wanted, empty=Wanted())
        requests.refuse_gone(scope)
        await answer_json(send, Generated(list(await self._pools.generate(pool, wanted.count))), 201)

    @operation(Answer(200, Member), refuses=_TOKEN)
    async def show_token(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Show one token, with the number of its latest lease, also when that is over."""
        pool = self._pool(scope)
        token = await self._pools.get(pool, scope["path_params"]["token"])
        shown = self._member(pool, token, scope["user"])
        shown.token, shown.fence = token.value, token.fence  # the caller knows the value
        await answer_json(send, shown)

    @operation(Answer(204), refuses=_TOKEN)
    async def delete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Delete a token."""
        await self._pools.delete(self._managed(scope), scope["path_params"]["token"])
        await answer(send, 204, b"")

    @operation(Answer(201, Leased), body=Borrower, empty=True, refuses=(*_POOL, *JSON_BODY, NoFreeToken))
    async def assign(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lend a token."""
        pool = self._pool(scope)
        wanted = await requests.json_body(scope, receive, _holder, empty=Borrower())
        user: Identity = scope["user"]
        holder = user.username if wanted.holder is None else check_name(wanted.holder)
        requests.refuse_gone(scope)
        token = await self._pools.assign(pool, holder, user.username)
        await answer_json(send, _lease(pool, token), 201)

    @operation(Answer(200, Leased), body=Claimed, empty=True, refuses=_LEASE)
    async def keep_alive(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a lease run for its full time from now."""
        pool = self._pool(scope)
        claim = await _claim(scope, receive)
        token = await self._pools.keep_alive(pool, scope["path_params"]["token"], claim)
        await answer_json(send, _lease(pool, token))

    @operation(Answer(204), body=Ended, empty=True, refuses=_LEASE, query={"force": bool})
    async def release(self, scope: Scope, receive: Receive, send: Send) -> None:
        """End a lease."""
        pool, token = self._pool(scope), scope["path_params"]["token"]
        user: Identity = scope["user"]
        if force := requests.query_flag(scope, "force"):
            self._managed(scope)
        ended = await requests.json_body(scope, receive, _ended, empty=Ended())
        claim = LeaseCheck(ended.holder, ended.fence, None if force else user.username)
        if ended.reason is not None and not force:
            raise InvalidRequest("reason: goes with ?force=true only.")
        if force:
            reason = None if ended.reason is None else check_name(ended.reason, "reason")
            await self._pools.force_release(pool, token, claim, user.username, reason)
        else:
            await self._pools.release(pool, token, claim)
        await answer(send, 204, b"")

    def _pool(self, scope: Scope) -> Pool:
        return self._pools.find(scope["path_params"]["pool"], scope["user"])

    def _managed(self, scope: Scope) -> Pool:
        return self._pools.find_managed(scope["path_params"]["pool"], scope["user"])

    async def _all(self, pool: Pool, after: str, limit: int) -> tuple[Sequence[PoolToken], str | None]:
        """Return a page of all tokens, ordered by value, and where the next page begins."""
        found = await self._pools.list_tokens(pool, after, limit + 1)
        return found[:limit], found[limit - 1].value if len(found) > limit else None

    async def _leases(self, pool: Pool, after: str, limit: int) -> tuple[Sequence[PoolToken], str | None]:
        """Return a page of the leased tokens, and where the next page begins: no value is told by that."""
        found = await self._pools.list_leases(pool, _place(after), limit + 1)
        following = "{!r}-{}".format(*found[limit - 1][0]) if len(found) > limit else None
        return [token for _, token in found[:limit]], following

    async def _counted(self, pool: Pool) -> Counted:
        available, leased = await self._pools.count(pool)
        return Counted(pool.name, pool.capacity, available, leased)

    def _member(self, pool: Pool, token: PoolToken, user: Identity) -> Member:
        expires_at = pool.expires_at(token)
        own = token.username == user.username or pool.managed_by(user)
        shown = Member(token.value if own else msgspec.UNSET, None if expires_at is None else int(expires_at))
        lease = token.lease(self._pools.now())
        if lease is not None:
            shown.user, shown.holder, shown.lease_expiry_time = token.username, lease.holder, int(lease.until)
            shown.fence = token.fence
        return shown


async def _claim(scope: Scope, receive: Receive) -> LeaseCheck:
    claimed = await requests.json_body(scope, receive, _claimed, empty=Claimed())
    return LeaseCheck(claimed.holder, claimed.fence, scope["user"].username)


def _place(after: str) -> LeaseCursor:
    """Read where a page of leases begins. Raises InvalidRequest."""
    if not after:
        return START_OF_LEASES
    place = _PLACE.fullmatch(after)
    if place is None:
        raise InvalidRequest("after: must be the `next` of an earlier page.")
    return float(place[1]), int(place[2])


def _lease(pool: Pool, token: PoolToken) -> Leased:
    """Show a lease that has begun anew: `expires_in` is its full time, for a clock of the client's own."""
    return Leased(token.value, token.holder or "", token.fence, int(token.free_at), int(pool.lease_ttl))
