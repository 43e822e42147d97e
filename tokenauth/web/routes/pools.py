"""/api/pools: generate, list, assign, keep alive, release and delete tokens. All require a token."""

import re
from collections.abc import Sequence
from typing import Annotated

import msgspec
from starlette.middleware import Middleware
from starlette.responses import Response

from tokenauth.clock import Clock
from tokenauth.errors import InvalidRequest
from tokenauth.models import (
    START_OF_LEASES,
    STARTS,
    Identity,
    LeaseCheck,
    LeaseCursor,
    LeaseRequest,
    LeaseTerms,
    ListCursor,
    ListKind,
    Member,
    Place,
    PlaceCursor,
    Pool,
    PoolToken,
)
from tokenauth.pools import (
    MAX_COUNT,
    MAX_ID,
    MAX_LABELS,
    MAX_LEASES,
    MAX_PRIORITY,
    MAX_TEXT,
    MAX_WAIT,
    Pools,
    Waits,
    check_label,
)
from tokenauth.settings.durations import Duration
from tokenauth.settings.model import canonical
from tokenauth.web.openapi import schema_only
from tokenauth.web.requests import Request, match_cursor
from tokenauth.web.responses import NO_CONTENT, JSONResponse
from tokenauth.web.routes.account import DURATION
from tokenauth.web.routing import Route, strict

PAGE = 100
"""Tokens on a page, unless `?limit=` is given."""


class GenerateRequest(msgspec.Struct, forbid_unknown_fields=True):
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)] = 1


_UNTIL = 'In Unix seconds, or a duration from now such as "2h".'
_Text = Annotated[str, schema_only(minLength=1, maxLength=MAX_TEXT, description="Printable.")]


class AssignRequest(msgspec.Struct, forbid_unknown_fields=True):
    holder: _Text | None = None
    request: Annotated[str, schema_only(minLength=1, maxLength=MAX_ID, description="Printable.")] | None = None
    wait: Annotated[float, msgspec.Meta(ge=0, le=MAX_WAIT)] | None = None
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_LEASES)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    ttl: Annotated[Duration, schema_only(description=DURATION)] | None = None
    labels: Annotated[list[str], msgspec.Meta(max_length=MAX_LABELS)] = []

    @property
    def is_plain(self) -> bool:
        """Whether it asks for one token at once, and is not to be repeated."""
        return self.wait is None and self.request is None and self.count is None and not self.priority


class KeepAliveRequest(msgspec.Struct, forbid_unknown_fields=True):
    holder: str | None = None
    fence: int | None = None


class ReleaseRequest(KeepAliveRequest):
    reason: _Text | None = None


class ReserveRequest(msgspec.Struct, forbid_unknown_fields=True):
    until: Annotated[Duration, schema_only(description=_UNTIL)]
    note: _Text | None = None
    user: _Text | None = msgspec.field(name="for", default=None)


class PoolAnswer(msgspec.Struct, omit_defaults=True):
    """A pool. Only one with members has `reserved`. `manager`: whether the caller manages it."""

    name: str
    capacity: int | None
    available: int
    leased: int
    waiting: int
    manager: bool
    reserved: int | msgspec.UnsetType = msgspec.UNSET


class ReservationAnswer(msgspec.Struct):
    """A reservation. `by` is `null` if it was made on the server's command line."""

    until: int
    note: str | None
    user: str | None = msgspec.field(name="for")
    by: str | None


class PoolTokenAnswer(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A token. Another user's token has no `token`, one that is free has no lease, and only a member has a name."""

    token: str | msgspec.UnsetType = msgspec.UNSET
    expiry_time: int | None
    user: str | msgspec.UnsetType | None = msgspec.UNSET
    holder: str | msgspec.UnsetType = msgspec.UNSET
    fence: int | msgspec.UnsetType = msgspec.UNSET
    leased_at: int | msgspec.UnsetType = msgspec.UNSET
    lease_expiry_time: int | msgspec.UnsetType = msgspec.UNSET
    max_expiry_time: int | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET
    labels: Sequence[str] | msgspec.UnsetType = msgspec.UNSET
    note: str | msgspec.UnsetType = msgspec.UNSET
    reservation: ReservationAnswer | msgspec.UnsetType = msgspec.UNSET


class LeaseAnswer(msgspec.Struct, omit_defaults=True):
    """A lease. Only that of a member has `name` and `labels`, and only one that ends for good `max_expiry_time`."""

    token: str
    holder: str
    fence: int
    expiry_time: int
    expires_in: int
    max_expiry_time: int | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET
    labels: Sequence[str] | msgspec.UnsetType = msgspec.UNSET
    request: str | msgspec.UnsetType = msgspec.UNSET


class LeasesAnswer(msgspec.Struct, omit_defaults=True):
    leases: list[LeaseAnswer]
    request: str | msgspec.UnsetType = msgspec.UNSET


class WaitsAnswer(msgspec.Struct):
    request: str
    position: int
    waiting: int
    retry_after: int


class InLineAnswer(msgspec.Struct, omit_defaults=True):
    """A request that waits. Only its user and managers of the pool see its id."""

    position: int
    user: str
    holder: str
    since: int
    count: int
    priority: int
    labels: list[str]
    request: str | msgspec.UnsetType = msgspec.UNSET


class LineAnswer(msgspec.Struct):
    waiting: int
    requests: list[InLineAnswer]


class MyLeaseAnswer(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A lease of the caller. Only that of a member has `name`."""

    pool: str
    token: str
    holder: str
    fence: int
    leased_at: int | None
    lease_expiry_time: int
    max_expiry_time: int | msgspec.UnsetType = msgspec.UNSET
    name: str | msgspec.UnsetType = msgspec.UNSET


class MyPlaceAnswer(msgspec.Struct, kw_only=True):
    pool: str
    request: str
    position: int
    waiting: int
    since: int
    holder: str
    count: int


class MyLeasesAnswer(msgspec.Struct):
    leases: list[MyLeaseAnswer]
    places: list[MyPlaceAnswer]
    next: str | None


class PoolsAnswer(msgspec.Struct):
    pools: list[PoolAnswer]


class PoolPageAnswer(PoolAnswer, kw_only=True):
    tokens: list[PoolTokenAnswer]
    next: str | None


class GeneratedAnswer(msgspec.Struct):
    tokens: list[str]


_generate_decoder = msgspec.json.Decoder(GenerateRequest)
_assign_decoder = msgspec.json.Decoder(AssignRequest)
_keep_alive_decoder = msgspec.json.Decoder(KeepAliveRequest)
_release_decoder = msgspec.json.Decoder(ReleaseRequest)
_reserve_decoder = msgspec.json.Decoder(ReserveRequest)
_EMPTY_ASSIGN, _EMPTY_KEEP_ALIVE, _EMPTY_RELEASE = AssignRequest(), KeepAliveRequest(), ReleaseRequest()


_CURSOR = re.compile(r"(\d{1,17}\.\d{1,17})-(\d{1,18})", re.ASCII)
_LIST_CURSOR = re.compile(rf"(leases|places)-({_CURSOR.pattern})?-(.+)", re.ASCII)
"""It has no numbers where it is the start of a list."""


class PoolRoutes:
    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def routes(self, middleware: Sequence[Middleware]) -> list[Route]:
        """List the routes; `middleware` guards all of them."""
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
            Route(
                f"{path}/members/{{name}}/reservation",
                {"PUT": strict(self.reserve, ["force"], body=True), "DELETE": strict(self.unreserve)},
                middleware,
            ),
            Route(f"{path}/requests/{{request:path}}", {"DELETE": strict(self.leave_line, ["user"])}, middleware),
            Route(f"{path}/requests", {"GET": strict(self.show_line, ["limit"])}, middleware),
            Route(f"{path}/tokens", {"POST": strict(self.generate, body=True)}, middleware),
            Route(path, {"GET": strict(self.show, ["after", "limit"])}, middleware),
            Route("/api/pools", {"GET": strict(self.list)}, middleware),
            Route("/api/leases", {"GET": strict(self.mine, ["after"])}, middleware),
        ]

    async def list(self, request: Request) -> Response:
        return JSONResponse(
            PoolsAnswer([await self._pool_answer(pool, request.user) for pool in self._pools.usable_by(request.user)])
        )

    async def mine(self, request: Request) -> Response:
        after = _parse_list_cursor(request.query_value("after") or "")
        leases, places, following = await self._pools.list_leases_and_places(request.user, after)
        return JSONResponse(
            MyLeasesAnswer(
                [_my_lease_answer(pool, token) for pool, token in leases],
                [_my_place_answer(*each) for each in places],
                following and _format_list_cursor(following),
            )
        )

    async def show(self, request: Request) -> Response:
        pool, user = self._find_pool(request), request.user
        limit = request.query_number("limit", PAGE, 1, MAX_COUNT)
        after = request.query_value("after") or ""
        if pool.members:
            page, following = await self._page_of_members(pool, after, limit)
        elif pool.managed_by(user):
            page, following = await self._page_of_tokens(pool, after, limit)
        else:
            page, following = await self._page_of_leases(pool, after, limit)
        counted = await self._pool_answer(pool, user)
        shown = [self._token_answer(pool, token, user) for token in page]
        return JSONResponse(PoolPageAnswer(**msgspec.structs.asdict(counted), tokens=shown, next=following))

    async def generate(self, request: Request) -> Response:
        pool = self._find_managed(request)
        body = await request.json_body(_generate_decoder, empty=GenerateRequest())
        request.raise_if_disconnected()
        return JSONResponse(
            GeneratedAnswer([*await self._pools.generate(pool, body.count, request.user.username)]), 201
        )

    async def show_token(self, request: Request) -> Response:
        pool = self._find_pool(request)
        token = await self._pools.get(pool, request.path_params["token"])
        shown = self._token_answer(pool, token, request.user)
        shown.token, shown.fence = token.value, token.fence  # the caller knows the value
        return JSONResponse(shown)

    async def delete(self, request: Request) -> Response:
        await self._pools.delete(self._find_managed(request), request.path_params["token"], request.user.username)
        return NO_CONTENT

    async def assign(self, request: Request) -> Response:
        pool = self._find_pool(request)
        body = await request.json_body(_assign_decoder, empty=_EMPTY_ASSIGN)
        username = request.user.username
        holder = username if body.holder is None else check_label(body.holder)
        request.raise_if_disconnected()
        if body.is_plain:
            leased = await self._pools.assign(pool, holder, username, body.ttl, body.labels)
            return _lease_response(pool, leased, self._pools.now, 201)
        id = None if body.request is None else check_label(body.request, "request", MAX_ID)
        count = 1 if body.count is None else body.count
        terms = LeaseTerms(holder, id, body.wait, count, body.priority, body.ttl, tuple(sorted({*body.labels})))
        answer = await self._pools.lease(pool, request.user, terms, request.disconnect_check)
        if isinstance(answer, Waits):
            # a request with `wait` was held open, and is held open again when it is repeated
            retry_after = 0 if body.wait else 1
            return JSONResponse(
                WaitsAnswer(answer.id, *answer.place, retry_after), 202, [(b"retry-after", b"%d" % retry_after)]
            )
        leases = [_lease_answer(pool, token, self._pools.now, new=bool(answer.before)) for token in answer.tokens]
        sent = answer.request.id if body.wait is not None or id is not None else msgspec.UNSET
        if body.count is not None:
            return JSONResponse(LeasesAnswer(leases=leases, request=sent), 201)
        leases[0].request = sent
        return JSONResponse(leases[0], 201)

    async def show_line(self, request: Request) -> Response:
        pool, user = self._find_pool(request), request.user
        limit = request.query_number("limit", PAGE, 1, MAX_COUNT)
        waiting, found = await self._pools.list_requests(pool, limit)
        shown = [
            InLineAnswer(
                *(position, each.username, each.holder, int(each.since), each.count, each.priority, [*each.labels]),
                each.id if each.username == user.username or pool.managed_by(user) else msgspec.UNSET,
            )
            for position, each in enumerate(found, 1)
        ]
        return JSONResponse(LineAnswer(waiting, shown))

    async def leave_line(self, request: Request) -> Response:
        pool, user = self._find_pool(request), request.query_value("user")
        if user not in {None, request.user.username}:
            self._find_managed(request)
        await self._pools.leave_line(pool, user or request.user.username, request.path_params["request"])
        return NO_CONTENT

    async def keep_alive(self, request: Request) -> Response:
        pool = self._find_pool(request)
        body = await request.json_body(_keep_alive_decoder, empty=_EMPTY_KEEP_ALIVE)
        check = LeaseCheck(body.holder, body.fence, request.user.username)
        kept = await self._pools.keep_alive(pool, request.path_params["token"], check)
        return _lease_response(pool, kept, self._pools.now)

    async def release(self, request: Request) -> Response:
        pool, token = self._find_pool(request), request.path_params["token"]
        username = request.user.username
        if force := request.query_flag("force"):
            self._find_managed(request)
        take = request.query_flag("take")
        body = await request.json_body(_release_decoder, empty=_EMPTY_RELEASE)
        if not force:
            if take or body.reason is not None:
                raise InvalidRequest(f"{'take' if take else 'reason'}: goes with ?force=true only.")
            await self._pools.release(pool, token, LeaseCheck(body.holder, body.fence, username))
            return NO_CONTENT
        reason = None if body.reason is None else check_label(body.reason, "reason")
        check = LeaseCheck(body.holder, body.fence)
        if take:
            request.raise_if_disconnected()
            taken = await self._pools.take_over(pool, token, username, username, check, reason)
            return _lease_response(pool, taken, self._pools.now)
        await self._pools.force_release(pool, token, check, username, reason)
        return NO_CONTENT

    async def reserve(self, request: Request) -> Response:
        pool, by = self._find_managed(request), request.user.username
        replace = request.query_flag("force")
        body = await request.json_body(_reserve_decoder)
        note = "" if body.note is None else check_label(body.note, "note")
        user = None if body.user is None else canonical(check_label(body.user, "for"))
        name = request.path_params["name"]
        token = await self._pools.reserve(pool, name, body.until, user, note, by, replace)
        return JSONResponse(self._token_answer(pool, token, request.user))

    async def unreserve(self, request: Request) -> Response:
        pool = self._find_managed(request)
        await self._pools.unreserve(pool, request.path_params["name"], request.user.username)
        return NO_CONTENT

    def _find_pool(self, request: Request) -> Pool:
        return self._pools.find(request.path_params["pool"], request.user)

    def _find_managed(self, request: Request) -> Pool:
        return self._pools.find_managed(request.path_params["pool"], request.user)

    async def _page_of_tokens(self, pool: Pool, after: str, limit: int) -> tuple[Sequence[PoolToken], str | None]:
        """Return a page of all tokens, ordered by value, and where the next page begins."""
        found = await self._pools.list_tokens(pool, after, limit + 1)
        return found[:limit], found[limit - 1].value if len(found) > limit else None

    async def _page_of_leases(self, pool: Pool, after: str, limit: int) -> tuple[Sequence[PoolToken], str | None]:
        """Return a page of the leased tokens, and where the next page begins, which reveals no value."""
        found = await self._pools.list_leases(pool, _parse_cursor(after), limit + 1)
        following = _format_cursor(found[limit - 1][0]) if len(found) > limit else None
        return [token for _, token in found[:limit]], following

    async def _page_of_members(self, pool: Pool, after: str, limit: int) -> tuple[Sequence[PoolToken], str | None]:
        """Return a page of the members, ordered by name, and where the next page begins."""
        found = [token for token in await self._pools.members(pool) if (token.member or "") > after]
        return found[:limit], found[limit - 1].member if len(found) > limit else None

    async def _pool_answer(self, pool: Pool, user: Identity) -> PoolAnswer:
        line = await self._pools.count_waiting(pool), pool.managed_by(user)
        if pool.members:
            available, leased, reserved = pool.count(await self._pools.members(pool), self._pools.now())
            return PoolAnswer(pool.name, pool.capacity, available, leased, *line, reserved)
        available, leased = await self._pools.count(pool)
        return PoolAnswer(pool.name, pool.capacity, available, leased, *line)

    def _token_answer(self, pool: Pool, token: PoolToken, user: Identity) -> PoolTokenAnswer:
        expires_at = pool.expires_at(token)
        now = self._pools.now()
        lease = token.lease(now)
        shown = PoolTokenAnswer(expiry_time=None if expires_at is None else int(expires_at))
        if pool.managed_by(user) or (lease is not None and token.username == user.username):
            shown.token = token.value
        if lease is not None:
            shown.user, shown.holder, shown.fence = token.username, lease.holder, token.fence
            shown.leased_at, shown.lease_expiry_time = _seconds(token.leased_at), int(lease.until)
            shown.max_expiry_time = _seconds(pool.lease_ends_by(token))
        if token.member is not None and pool.members:
            shown.name, shown.labels, shown.note = _member(pool, token.member)
            reservation = pool.reservation(token, now)
            if reservation is not None:
                until, username, note, by = reservation
                shown.reservation = ReservationAnswer(int(until), note or None, username, by or None)
        return shown


def _parse_cursor(after: str) -> LeaseCursor:
    """Parse where a page of leases begins. Raises InvalidRequest."""
    if not after:
        return START_OF_LEASES
    place = match_cursor(_CURSOR, after)
    return float(place[1]), int(place[2])


def _format_cursor(cursor: LeaseCursor | PlaceCursor) -> str:
    return "{!r}-{}".format(*cursor)


def _parse_list_cursor(after: str) -> ListCursor | None:
    """Parse where a page of what a user has leased begins. Raises InvalidRequest."""
    if not after:
        return None
    place = match_cursor(_LIST_CURSOR, after)
    kind: ListKind = "leases" if place[1] == "leases" else "places"
    return ListCursor(kind, place[5], _parse_cursor(place[2]) if place[2] else STARTS[kind])


def _format_list_cursor(cursor: ListCursor) -> str:
    numbers = "" if cursor.cursor == STARTS[cursor.kind] else _format_cursor(cursor.cursor)
    return f"{cursor.kind}-{numbers}-{cursor.pool}"


def _lease_response(pool: Pool, token: PoolToken, now: Clock, status: int = 200) -> Response:
    return JSONResponse(_lease_answer(pool, token, now), status)


def _lease_answer(pool: Pool, token: PoolToken, now: Clock, new: bool = True) -> LeaseAnswer:
    """Show a lease. `new`: it was just granted or extended. `expires_in` is for clients whose clock may be wrong."""
    expires_in = pool.lease_ttl if token.lease_ttl is None else token.lease_ttl
    latest = pool.lease_ends_by(token)
    if not new:
        expires_in = max(0, token.free_at - now())
    elif latest is not None:
        expires_in = max(0, min(expires_in, latest - now()))
    shown = LeaseAnswer(
        token.value, token.holder or "", token.fence, int(token.free_at), int(expires_in), _seconds(latest)
    )
    if token.member is not None and pool.members:
        shown.name, shown.labels, _ = _member(pool, token.member)
    return shown


def _my_lease_answer(pool: Pool, token: PoolToken) -> MyLeaseAnswer:
    return MyLeaseAnswer(
        pool=pool.name,
        token=token.value,
        holder=token.holder or "",
        fence=token.fence,
        leased_at=None if token.leased_at is None else int(token.leased_at),
        lease_expiry_time=int(token.free_at),
        max_expiry_time=_seconds(pool.lease_ends_by(token)),
        name=token.member if token.member is not None and pool.members else msgspec.UNSET,
    )


def _my_place_answer(pool: Pool, request: LeaseRequest, place: Place) -> MyPlaceAnswer:
    return MyPlaceAnswer(
        pool=pool.name,
        request=request.id,
        position=place.position,
        waiting=place.waiting,
        since=int(request.since),
        holder=request.holder,
        count=request.count,
    )


def _seconds(instant: float | None) -> int | msgspec.UnsetType:
    """Return an instant in whole seconds; UNSET, which leaves the field out, for None."""
    return msgspec.UNSET if instant is None else int(instant)


def _member(pool: Pool, name: str) -> Member:
    """Return a member; one that was taken out of the configuration has no labels."""
    return pool.members.get(name) or Member(name)
