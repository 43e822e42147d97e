"""The HTTP of token-pool: a pool of UUIDs that may be blocked for a while."""

import re
from dataclasses import replace
from typing import Any, Literal

import msgspec
from starlette.types import Receive, Scope, Send

from tokenauth.errors import NoFreeToken, NotFound, PoolFull, StoreUnavailable, UnknownToken
from tokenauth.pools import Pools
from tokenauth.settings.dialects import DialectSettings
from tokenauth.web import openapi, requests
from tokenauth.web.openapi import Section
from tokenauth.web.operations import JSON_BODY, Answer, operation
from tokenauth.web.responses import answer_json
from tokenauth.web.routing import Handlers

NAME = "token-pool"

_UNKNOWN = ["Invalid token id"]


class NamedUuid(msgspec.Struct):
    """Which token is meant, under either name."""

    token: Any = None
    token_uuid: Any = None


class Made(msgspec.Struct):
    """The token that was made."""

    token: str


class Done(msgspec.Struct):
    """What was done."""

    response: str


class Blocked(msgspec.Struct):
    """The token that was lent."""

    blocked_token: str


class NoneFree(msgspec.Struct):
    """No token can be lent."""

    error: Literal["No free tokens"] = "No free tokens"


_named = msgspec.json.Decoder(NamedUuid)
_NO_SUCH = Answer(400, list[Literal["Invalid token id"]], "There is no such token.")


_EXAMPLE_VALUE = "0b5e7f36-41cb-4d1c-9f0f-5c3b8f7c2a10"
_INVALID = openapi.Answer(400, "The token does not exist.", list[Literal["Invalid token id"]], ["Invalid token id"])
_OPERATIONS = [
    openapi.Operation(
        method="POST",
        path="/api/token_pool",
        id="tokenPoolGenerate",
        title="Generate a token",
        text="Adds a free token to the pool.",
        answers=[openapi.Answer(200, "The new token.", Made, {"token": _EXAMPLE_VALUE})],
        refusals=[PoolFull, StoreUnavailable],
    ),
    openapi.Operation(
        method="POST",
        path="/api/block_token",
        id="tokenPoolBlock",
        title="Lease a token",
        text="Leases the token that has been free for the longest time.",
        answers=[
            openapi.Answer(200, "The token.", Blocked, {"blocked_token": _EXAMPLE_VALUE}),
            openapi.Answer(404, "No token is free.", NoneFree, {"error": "No free tokens"}),
        ],
        refusals=[StoreUnavailable],
    ),
    openapi.Operation(
        method="POST",
        path="/api/keep_alive/{token}",
        id="tokenPoolKeepAlive",
        title="Keep a token alive",
        text="Lets the token, and its lease if it is leased, live for the full time from now.",
        parameters=[openapi.Parameter("token", "The token, a UUID.", str, _EXAMPLE_VALUE)],
        answers=[
            openapi.Answer(200, "It is extended.", Done, {"response": "Token refreshed successfully"}),
            _INVALID,
        ],
        refusals=[NotFound, StoreUnavailable],
    ),
    openapi.Operation(
        method="DELETE",
        path="/api/token_pool",
        id="tokenPoolDelete",
        title="Delete a token",
        text="Deletes a token, also while it is leased. The field may also be called `token_uuid`.",
        body=NamedUuid,
        body_required=False,
        example={"token": _EXAMPLE_VALUE},
        answers=[
            openapi.Answer(200, "The token is deleted.", Done, {"response": "Token deleted successfully"}),
            _INVALID,
        ],
        refusals=[*JSON_BODY, StoreUnavailable],
    ),
]

DOCUMENTATION = Section(
    name=NAME,
    text="Compatible with token-pool: UUIDs that are leased for a while. Each path also works with a slash at its end.",
    operations=[
        *_OPERATIONS,
        *(replace(each, path=f"{each.path}/", id=f"{each.id}Slash") for each in _OPERATIONS),
    ],
)


class TokenPool:
    """The handlers, and the addresses that they answer at."""

    def __init__(self, pools: Pools, terms: DialectSettings) -> None:
        self._pools = pools
        self._pool = pools.find(terms.pool)

    def routes(self) -> dict[str, Handlers]:
        """List the addresses: each with and without its trailing slash."""
        addresses: dict[str, Handlers] = {
            "/api/token_pool": {"POST": self.generate, "DELETE": self.delete},
            "/api/block_token": {"POST": self.block},
            "/api/keep_alive/{token}": {"POST": self.keep_alive},
        }
        return addresses | {f"{path}/": handlers for path, handlers in addresses.items()}

    @operation(Answer(200, Made), refuses=(PoolFull, StoreUnavailable))
    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make one token."""
        requests.refuse_gone(scope)
        pool = self._pools.find_managed(self._pool.name, requests.user(scope))
        [token] = await self._pools.generate(pool, 1)
        await answer_json(send, Made(token))

    @operation(Answer(200, Done), _NO_SUCH, body=NamedUuid, empty=True, refuses=(*JSON_BODY, StoreUnavailable))
    async def delete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Delete a token."""
        pool = self._pools.find_managed(self._pool.name, requests.user(scope))
        named = await requests.json_body(scope, receive, _named, empty=NamedUuid())
        try:
            await self._pools.delete(pool, _uuid(named.token or named.token_uuid))
        except UnknownToken:
            await answer_json(send, _UNKNOWN, 400)
        else:
            await answer_json(send, Done("Token deleted successfully"))

    @operation(Answer(200, Blocked), Answer(404, NoneFree), refuses=(StoreUnavailable,))
    async def block(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lend a token."""
        requests.refuse_gone(scope)
        user = requests.username(scope)
        try:
            token = await self._pools.assign(self._pool, user or NAME, user)
        except NoFreeToken:
            await answer_json(send, NoneFree(), 404)
        else:
            await answer_json(send, Blocked(token.value))

    @operation(Answer(200, Done), _NO_SUCH, refuses=(NotFound, StoreUnavailable))
    async def keep_alive(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a token live, and stay blocked if it is, for its full time."""
        try:
            value = _uuid(scope["path_params"]["token"])
        except UnknownToken:
            raise NotFound from None
        try:
            await self._pools.keep_alive_any(self._pool, value, requests.user(scope))
        except UnknownToken:
            await answer_json(send, _UNKNOWN, 400)
        else:
            await answer_json(send, Done("Token refreshed successfully"))


_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)


def _uuid(named: object) -> str:
    """Write a UUID as tokens are written. Raises UnknownToken for what is none."""
    if not isinstance(named, str) or _UUID.fullmatch(named) is None:
        raise UnknownToken
    return named.lower()
