"""/api/pools: generate, assign, keep alive, release, delete, and what there is. All behind TokenMiddleware."""

import re
from collections.abc import Sequence
from typing import Annotated

import msgspec
from starlette.middleware import Middleware
from starlette.responses import Response

from tokenauth.errors import InvalidRequest
from tokenauth.models import START_OF_LEASES, Identity, LeaseCheck, LeaseCursor, Pool, PoolToken
from tokenauth.pools import MAX_COUNT, MAX_TEXT, Pools, check_name
from tokenauth.web.openapi import schema_only
from tokenauth.web.requests import Request
from tokenauth.web.responses import JSONResponse, NoStoreResponse
from tokenauth.web.routing import Route, exact

PAGE = 100
"""Tokens on a page, unless `?limit=` says otherwise."""


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    """How many tokens are to be made."""

    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)] = 1


class Borrower(msgspec.Struct, forbid_unknown_fields=True):
    """Who is to have the token; the user, if it is not said."""

    holder: Annotated[str, schema_only(minLength=1, maxLength=MAX_TEXT, description="Printable.")] | None = None


class Claimed(msgspec.Struct, forbid_unknown_fields=True):
    """What the caller knows of the lease that it says it has; what is left out is not compared."""

    holder: str | None = None
    fence: int | None = None


class Ended(Claimed):
    """What the caller knows of the lease that it ends, and why a manager ends another user's: that is logged."""

    reason: Annotated[str, schema_only(minLength=1, maxLength=MAX_TEXT, description="Printable.")] | None = None


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
_EMPTY_BORROWER, _EMPTY_CLAIMED, _EMPTY_ENDED = Borrower(), Claimed(), Ended()


_PLACE = re.compile(r"(\d{1,17}\.\d{1,17})-(\d{1,18})", re.ASCII)


class PoolRoutes:
    """The handlers, and their routes."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def routes(self, middleware: Sequence[Middleware]) -> list[Route]:
        """List the routes, the most used ones first: Starlette tries one after the other."""
        one = "/api/pools/{pool}"
        leases = {"PUT": exact(self.keep_alive, body=True), "DELETE": exact(self.release, ["force"], body=True)}
        return [
            Route(f"{one}/leases/{{token}}", leases, middleware),
            Route(f"{one}/leases", {"POST": exact(self.assign, body=True)}, middleware),
            Route(f"{one}/tokens/{{token}}", {"GET": exact(self.show_token), "DELETE": exact(self.delete)}, middleware),
            Route(f"{one}/tokens", {"POST": exact(self.generate, body=True)}, middleware),
            Route(one, {"GET": exact(self.show, ["after", "limit"])}, middleware),
            Route("/api/pools", {"GET": exact(self.list)}, middleware),
        ]

    async def list(self, request: Request) -> Response:
        """Say how many tokens each pool has."""
        return JSONResponse(Listing([await self._counted(pool) for pool in self._pools.usable_by(request.user)]))

    async def show(self, request: Request) -> Response:
        """List the tokens of a pool, page by page: all of them to who manages it, the leased ones to others."""
        pool, user = self._pool(request), request.user
        limit = request.query_number("limit", PAGE, 1, MAX_COUNT)
        after = request.query_value("after") or ""
        page, following = await (self._all if pool.managed_by(user) else self._leases)(pool, after, limit)
        available, leased = await self._pools.count(pool)
        members = [self._member(pool, token, user) for token in page]
        return JSONResponse(Page(pool.name, pool.capacity, available, leased, members, following))

    async def generate(self, request: Request) -> Response:
        """Add tokens."""
        pool = self._managed(request)
        body = await request.json_body(_wanted, empty=Wanted())
        request.refuse_gone()
        return JSONResponse(Generated([*await self._pools.generate(pool, body.count)]), 201)

    async def show_token(self, request: Request) -> Response:
        """Show one token, with the number of its latest lease, also when that is over."""
        pool = self._pool(request)
        token = await self._pools.get(pool, request.path_params["token"])
        shown = self._member(pool, token, request.user)
        shown.token, shown.fence = token.value, token.fence  # the caller knows the value
        return JSONResponse(shown)

    async def delete(self, request: Request) -> Response:
        """Delete a token."""
        await self._pools.delete(self._managed(request), request.path_params["token"])
        return NoStoreResponse(status_code=204)

    async def assign(self, request: Request) -> Response:
        """Lend a token."""
        pool = self._pool(request)
        body = await request.json_body(_holder, empty=_EMPTY_BORROWER)
        username = request.user.username
        holder = username if body.holder is None else check_name(body.holder)
        request.refuse_gone()
        return _lease(pool, await self._pools.assign(pool, holder, username), 201)

    async def keep_alive(self, request: Request) -> Response:
        """Let a lease run for its full time from now."""
        pool = self._pool(request)
        body = await request.json_body(_claimed, empty=_EMPTY_CLAIMED)
        check = LeaseCheck(body.holder, body.fence, request.user.username)
        return _lease(pool, await self._pools.keep_alive(pool, request.path_params["token"], check))

    async def release(self, request: Request) -> Response:
        """End a lease."""
        pool, token = self._pool(request), request.path_params["token"]
        username = request.user.username
        if force := request.query_flag("force"):
            self._managed(request)
        body = await request.json_body(_ended, empty=_EMPTY_ENDED)
        if body.reason is not None and not force:
            raise InvalidRequest("reason: goes with ?force=true only.")
        if force:
            reason = None if body.reason is None else check_name(body.reason, "reason")
            await self._pools.force_release(pool, token, LeaseCheck(body.holder, body.fence), username, reason)
        else:
            await self._pools.release(pool, token, LeaseCheck(body.holder, body.fence, username))
        return NoStoreResponse(status_code=204)

    def _pool(self, request: Request) -> Pool:
        return self._pools.find(request.path_params["pool"], request.user)

    def _managed(self, request: Request) -> Pool:
        return self._pools.find_managed(request.path_params["pool"], request.user)

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


def _place(after: str) -> LeaseCursor:
    """Read where a page of leases begins. Raises InvalidRequest."""
    if not after:
        return START_OF_LEASES
    place = _PLACE.fullmatch(after)
    if place is None:
        raise InvalidRequest("after: must be the `next` of an earlier page.")
    return float(place[1]), int(place[2])


def _lease(pool: Pool, token: PoolToken, status: int = 200) -> Response:
    """Show a lease that starts now. `expires_in` is its full time, for clients whose clock may be wrong."""
    shown = Leased(token.value, token.holder or "", token.fence, int(token.free_at), int(pool.lease_ttl))
    return JSONResponse(shown, status)
