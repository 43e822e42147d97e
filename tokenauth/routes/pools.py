"""/api/pools: generate, assign, keep alive, release, delete, and what there is. All behind TokenMiddleware."""

from typing import Annotated

import msgspec
from starlette.types import Receive, Scope, Send

from tokenauth.models import Claim, Identity, Pool, PoolToken
from tokenauth.pools import MAX_COUNT, Pools, named_holder
from tokenauth.routes import requests
from tokenauth.routes.refusals import answer, answer_json
from tokenauth.routes.table import Handlers

PAGE = 100
"""Tokens on a page, unless `?limit=` says otherwise."""


class _Wanted(msgspec.Struct):
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)] = 1


class _Holder(msgspec.Struct):
    holder: str | None = None


class _Claimed(msgspec.Struct):
    holder: str | None = None
    fence: int | None = None


class _Counted(msgspec.Struct):
    name: str
    capacity: int | None
    available: int
    leased: int


class _Member(msgspec.Struct, omit_defaults=True):
    token: str
    expiry_time: int | None
    holder: str | msgspec.UnsetType = msgspec.UNSET
    fence: int | msgspec.UnsetType = msgspec.UNSET
    lease_expiry_time: int | msgspec.UnsetType = msgspec.UNSET


class _Lease(msgspec.Struct):
    token: str
    holder: str
    fence: int
    expiry_time: int
    expires_in: int


_wanted = msgspec.json.Decoder(_Wanted)
_holder = msgspec.json.Decoder(_Holder)
_claimed = msgspec.json.Decoder(_Claimed)


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

    async def list(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Say how many tokens each pool has."""
        counted = [await self._counted(pool) for pool in self._pools.open_to(scope["user"])]
        await answer_json(send, {"pools": counted})

    async def show(self, scope: Scope, receive: Receive, send: Send) -> None:
        """List the tokens of a pool, page by page."""
        pool = self._pool(scope)
        limit = requests.query_number(scope, "limit", PAGE, 1, MAX_COUNT)
        after = requests.query_value(scope, "after") or ""
        found = await self._pools.members(pool, after, limit + 1)
        page = found[:limit]
        following = page[-1].value if len(found) > limit else None
        counted = msgspec.structs.asdict(await self._counted(pool))
        await answer_json(send, {**counted, "tokens": [self._member(pool, token) for token in page], "next": following})

    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add tokens."""
        pool = self._pool(scope)
        wanted = await requests.json_body(scope, receive, _wanted, empty=_Wanted())
        await answer_json(send, {"tokens": await self._pools.generate(pool, wanted.count)}, 201)

    async def show_token(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Show one token, with the number of its latest lease, also when that is over."""
        pool = self._pool(scope)
        token = await self._pools.get(pool, scope["path_params"]["token"])
        shown = self._member(pool, token)
        shown.fence = token.fence
        await answer_json(send, shown)

    async def delete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Delete a token."""
        await self._pools.delete(self._pool(scope), scope["path_params"]["token"])
        await answer(send, 204, b"")

    async def assign(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lend a token."""
        pool = self._pool(scope)
        wanted = await requests.json_body(scope, receive, _holder, empty=_Holder())
        user: Identity = scope["user"]
        holder = user.username if wanted.holder is None else named_holder(wanted.holder)
        token = await self._pools.assign(pool, holder)
        await answer_json(send, _lease(pool, token), 201)

    async def keep_alive(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a lease run for its full time from now."""
        pool = self._pool(scope)
        claim = await _claim(scope, receive)
        token = await self._pools.keep_alive(pool, scope["path_params"]["token"], claim)
        await answer_json(send, _lease(pool, token))

    async def release(self, scope: Scope, receive: Receive, send: Send) -> None:
        """End a lease."""
        pool = self._pool(scope)
        await self._pools.release(pool, scope["path_params"]["token"], await _claim(scope, receive))
        await answer(send, 204, b"")

    def _pool(self, scope: Scope) -> Pool:
        return self._pools.find(scope["path_params"]["pool"], scope["user"])

    async def _counted(self, pool: Pool) -> _Counted:
        available, leased = await self._pools.count(pool)
        return _Counted(pool.name, pool.capacity, available, leased)

    def _member(self, pool: Pool, token: PoolToken) -> _Member:
        expires_at = pool.expires_at(token)
        shown = _Member(token.value, None if expires_at is None else int(expires_at))
        lease = token.lease(self._pools.now())
        if lease is not None:
            shown.holder, shown.fence, shown.lease_expiry_time = lease.holder, token.fence, int(lease.until)
        return shown


async def _claim(scope: Scope, receive: Receive) -> Claim:
    claimed = await requests.json_body(scope, receive, _claimed, empty=_Claimed())
    return Claim(claimed.holder, claimed.fence)


def _lease(pool: Pool, token: PoolToken) -> _Lease:
    """Show a lease that has begun anew: `expires_in` is its full time, for a clock of the client's own."""
    return _Lease(token.value, token.holder or "", token.fence, int(token.free_at), int(pool.lease_ttl))
