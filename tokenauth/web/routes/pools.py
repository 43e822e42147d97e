"""/api/pools: generate, list, assign, keep alive, release and delete tokens. All require a token."""

import re
from collections.abc import Sequence
from typing import Annotated

import msgspec
from starlette.middleware import Middleware
from starlette.responses import Response

from tokenauth.errors import InvalidRequest
from tokenauth.models import START_OF_LEASES, Identity, LeaseCheck, LeaseCursor, Pool, PoolToken
from tokenauth.pools import MAX_COUNT, MAX_TEXT, Pools, check_label
from tokenauth.web.openapi import schema_only
from tokenauth.web.requests import Request
from tokenauth.web.responses import NO_CONTENT, JSONResponse
from tokenauth.web.routing import Route, strict

PAGE = 100
"""Tokens on a page, unless `?limit=` is given."""


class GenerateRequest(msgspec.Struct, forbid_unknown_fields=True):
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)] = 1


class AssignRequest(msgspec.Struct, forbid_unknown_fields=True):
    holder: Annotated[str, schema_only(minLength=1, maxLength=MAX_TEXT, description="Printable.")] | None = None


class KeepAliveRequest(msgspec.Struct, forbid_unknown_fields=True):
    holder: str | None = None
    fence: int | None = None


class ReleaseRequest(KeepAliveRequest):
    reason: Annotated[str, schema_only(minLength=1, maxLength=MAX_TEXT, description="Printable.")] | None = None


class PoolAnswer(msgspec.Struct):
    name: str
    capacity: int | None
    available: int
    leased: int


class PoolTokenAnswer(msgspec.Struct, omit_defaults=True):
    """A token. Another user's leased token has no `token`; one that is free has no lease."""

    token: str | msgspec.UnsetType
    expiry_time: int | None
    user: str | msgspec.UnsetType | None = msgspec.UNSET
    holder: str | msgspec.UnsetType = msgspec.UNSET
    fence: int | msgspec.UnsetType = msgspec.UNSET
    lease_expiry_time: int | msgspec.UnsetType = msgspec.UNSET


class LeaseAnswer(msgspec.Struct):
    token: str
    holder: str
    fence: int
    expiry_time: int
    expires_in: int


class PoolsAnswer(msgspec.Struct):
    pools: list[PoolAnswer]


class PoolPageAnswer(PoolAnswer):
    tokens: list[PoolTokenAnswer]
    next: str | None


class GeneratedAnswer(msgspec.Struct):
    tokens: list[str]


_generate = msgspec.json.Decoder(GenerateRequest)
_assign = msgspec.json.Decoder(AssignRequest)
_keep_alive = msgspec.json.Decoder(KeepAliveRequest)
_release = msgspec.json.Decoder(ReleaseRequest)
_EMPTY_ASSIGN, _EMPTY_KEEP_ALIVE, _EMPTY_RELEASE = AssignRequest(), KeepAliveRequest(), ReleaseRequest()


_CURSOR = re.compile(r"(\d{1,17}\.\d{1,17})-(\d{1,18})", re.ASCII)


class PoolRoutes:
    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def routes(self, middleware: Sequence[Middleware]) -> list[Route]:
        """List the routes, the most used ones first: Starlette tries one after the other."""
        path = "/api/pools/{pool}"
        leases = {
            "PUT": strict(self.keep_alive, body=True),
            "DELETE": strict(self.release, ["force", "take"], body=True),
        }
        return [
            Route(f"{path}/leases/{{token}}", leases, middleware),
            Route(f"{path}/leases", {"POST": strict(self.assign, body=True)}, middleware),
            Route(
                f"{path}/tokens/{{token}}", {"GET": strict(self.show_token), "DELETE": strict(self.delete)}, middleware
            ),
            Route(f"{path}/tokens", {"POST": strict(self.generate, body=True)}, middleware),
            Route(path, {"GET": strict(self.show, ["after", "limit"])}, middleware),
            Route("/api/pools", {"GET": strict(self.list)}, middleware),
        ]

    async def list(self, request: Request) -> Response:
        return JSONResponse(PoolsAnswer([await self._count(pool) for pool in self._pools.usable_by(request.user)]))

    async def show(self, request: Request) -> Response:
        pool, user = self._pool(request), request.user
        limit = request.query_number("limit", PAGE, 1, MAX_COUNT)
        after = request.query_value("after") or ""
        page, following = await (self._all if pool.managed_by(user) else self._leases)(pool, after, limit)
        available, leased = await self._pools.count(pool)
        members = [self._show(pool, token, user) for token in page]
        return JSONResponse(PoolPageAnswer(pool.name, pool.capacity, available, leased, members, following))

    async def generate(self, request: Request) -> Response:
        pool = self._managed(request)
        body = await request.json_body(_generate, empty=GenerateRequest())
        request.raise_if_disconnected()
        return JSONResponse(GeneratedAnswer([*await self._pools.generate(pool, body.count)]), 201)

    async def show_token(self, request: Request) -> Response:
        pool = self._pool(request)
        token = await self._pools.get(pool, request.path_params["token"])
        shown = self._show(pool, token, request.user)
        shown.token, shown.fence = token.value, token.fence  # the caller knows the value
        return JSONResponse(shown)

    async def delete(self, request: Request) -> Response:
        await self._pools.delete(self._managed(request), request.path_params["token"])
        return NO_CONTENT

    async def assign(self, request: Request) -> Response:
        pool = self._pool(request)
        body = await request.json_body(_assign, empty=_EMPTY_ASSIGN)
        username = request.user.username
        holder = username if body.holder is None else check_label(body.holder)
        request.raise_if_disconnected()
        return _lease(pool, await self._pools.assign(pool, holder, username), 201)

    async def keep_alive(self, request: Request) -> Response:
        pool = self._pool(request)
        body = await request.json_body(_keep_alive, empty=_EMPTY_KEEP_ALIVE)
        check = LeaseCheck(body.holder, body.fence, request.user.username)
        return _lease(pool, await self._pools.keep_alive(pool, request.path_params["token"], check))

    async def release(self, request: Request) -> Response:
        pool, token = self._pool(request), request.path_params["token"]
        username = request.user.username
        if force := request.query_flag("force"):
            self._managed(request)
        take = request.query_flag("take")
        body = await request.json_body(_release, empty=_EMPTY_RELEASE)
        if not force:
            if take or body.reason is not None:
                raise InvalidRequest(f"{'take' if take else 'reason'}: goes with ?force=true only.")
            await self._pools.release(pool, token, LeaseCheck(body.holder, body.fence, username))
            return NO_CONTENT
        reason = None if body.reason is None else check_label(body.reason, "reason")
        check = LeaseCheck(body.holder, body.fence)
        if take:
            request.raise_if_disconnected()
            return _lease(pool, await self._pools.take_over(pool, token, username, username, check, reason))
        await self._pools.force_release(pool, token, check, username, reason)
        return NO_CONTENT

    def _pool(self, request: Request) -> Pool:
        return self._pools.find(request.path_params["pool"], request.user)

    def _managed(self, request: Request) -> Pool:
        return self._pools.find_managed(request.path_params["pool"], request.user)

    async def _all(self, pool: Pool, after: str, limit: int) -> tuple[Sequence[PoolToken], str | None]:
        """Return a page of all tokens, ordered by value, and where the next page begins."""
        found = await self._pools.list_tokens(pool, after, limit + 1)
        return found[:limit], found[limit - 1].value if len(found) > limit else None

    async def _leases(self, pool: Pool, after: str, limit: int) -> tuple[Sequence[PoolToken], str | None]:
        """Return a page of the leased tokens, and where the next page begins, which reveals no value."""
        found = await self._pools.list_leases(pool, _cursor(after), limit + 1)
        following = "{!r}-{}".format(*found[limit - 1][0]) if len(found) > limit else None
        return [token for _, token in found[:limit]], following

    async def _count(self, pool: Pool) -> PoolAnswer:
        available, leased = await self._pools.count(pool)
        return PoolAnswer(pool.name, pool.capacity, available, leased)

    def _show(self, pool: Pool, token: PoolToken, user: Identity) -> PoolTokenAnswer:
        expires_at = pool.expires_at(token)
        own = token.username == user.username or pool.managed_by(user)
        shown = PoolTokenAnswer(token.value if own else msgspec.UNSET, None if expires_at is None else int(expires_at))
        lease = token.lease(self._pools.now())
        if lease is not None:
            shown.user, shown.holder, shown.lease_expiry_time = token.username, lease.holder, int(lease.until)
            shown.fence = token.fence
        return shown


def _cursor(after: str) -> LeaseCursor:
    """Parse where a page of leases begins. Raises InvalidRequest."""
    if not after:
        return START_OF_LEASES
    place = _CURSOR.fullmatch(after)
    if place is None:
        raise InvalidRequest("after: must be the `next` of an earlier page.")
    return float(place[1]), int(place[2])


def _lease(pool: Pool, token: PoolToken, status: int = 200) -> Response:
    """Show a lease that starts now. `expires_in` is its full time, for clients whose clock may be wrong."""
    shown = LeaseAnswer(token.value, token.holder or "", token.fence, int(token.free_at), int(pool.lease_ttl))
    return JSONResponse(shown, status)
