"""The HTTP of token-pool: a pool of UUIDs that can be blocked for a while."""

import re
from dataclasses import replace
from typing import Any, Literal

import msgspec
from starlette.responses import Response

from tokenauth.errors import NoFreeToken, PoolFull, UnknownToken
from tokenauth.service import Service
from tokenauth.settings.dialects import DialectSettings
from tokenauth.web.exceptions import NotFound
from tokenauth.web.openapi import JSON_BODY, STORE, Answer, Operation, Parameter, Section
from tokenauth.web.requests import Request
from tokenauth.web.responses import DialectResponse
from tokenauth.web.routing import Handlers, when_complete

NAME = "token-pool"

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)


class UuidRequest(msgspec.Struct):
    """A token, under either name. Whatever is not a UUID is an unknown token."""

    token: Any = None
    token_uuid: Any = None


class UuidAnswer(msgspec.Struct):
    token: str


class ResponseAnswer(msgspec.Struct):
    response: str


class BlockedAnswer(msgspec.Struct):
    blocked_token: str


class NoneFreeAnswer(msgspec.Struct):
    error: Literal["No free tokens"] = "No free tokens"


_decoder = msgspec.json.Decoder(UuidRequest)


class TokenPool:
    def __init__(self, service: Service, settings: DialectSettings) -> None:
        self._pools = service.pools
        self._pool = service.pools.find(settings.pool)

    def handlers(self) -> dict[str, Handlers]:
        """Return the handlers of each path below the prefix, with and without a slash at its end."""
        handlers: dict[str, Handlers] = {
            "/api/token_pool": {"POST": when_complete(self.generate), "DELETE": self.delete},
            "/api/block_token": {"POST": when_complete(self.block)},
            "/api/keep_alive/{token}": {"POST": when_complete(self.keep_alive)},
        }
        return handlers | {f"{path}/": methods for path, methods in handlers.items()}

    async def generate(self, request: Request) -> Response:
        request.raise_if_disconnected()
        pool = self._pools.find_managed(self._pool.name, request.identity)
        [token] = await self._pools.generate(pool, 1)
        return DialectResponse(UuidAnswer(token))

    async def delete(self, request: Request) -> Response:
        pool = self._pools.find_managed(self._pool.name, request.identity)
        body = await request.json_body(_decoder, empty=UuidRequest())
        try:
            await self._pools.delete(pool, _uuid(body.token or body.token_uuid))
        except UnknownToken:
            return _invalid_token()
        return DialectResponse(ResponseAnswer("Token deleted successfully"))

    async def block(self, request: Request) -> Response:
        request.raise_if_disconnected()
        try:
            token = await self._pools.assign(self._pool, request.username or NAME, request.username)
        except NoFreeToken:
            return DialectResponse(NoneFreeAnswer(), 404)
        return DialectResponse(BlockedAnswer(token.value))

    async def keep_alive(self, request: Request) -> Response:
        try:
            value = _uuid(request.path_params["token"])
        except UnknownToken:
            raise NotFound from None
        try:
            await self._pools.keep_alive_any(self._pool, value, request.identity)
        except UnknownToken:
            return _invalid_token()
        return DialectResponse(ResponseAnswer("Token refreshed successfully"))


def _uuid(value: object) -> str:
    """Return a UUID in lower case, as tokens are stored. Raises UnknownToken for anything else."""
    if not isinstance(value, str) or _UUID.fullmatch(value) is None:
        raise UnknownToken
    return value.lower()


def _invalid_token() -> Response:
    return DialectResponse(["Invalid token id"], 400)


_EXAMPLE_VALUE = "0b5e7f36-41cb-4d1c-9f0f-5c3b8f7c2a10"
_INVALID = Answer(400, "The token does not exist.", list[Literal["Invalid token id"]], ["Invalid token id"])
_OPERATIONS = [
    Operation(
        method="POST",
        path="/api/token_pool",
        id="tokenPoolGenerate",
        title="Generate a token",
        text="Adds a free token to the pool.",
        answers=[Answer(200, "The new token.", UuidAnswer, {"token": _EXAMPLE_VALUE})],
        refusals=[PoolFull, *STORE],
    ),
    Operation(
        method="POST",
        path="/api/block_token",
        id="tokenPoolBlock",
        title="Lease a token",
        text="Leases the token that has been free for the longest time.",
        answers=[
            Answer(200, "The token.", BlockedAnswer, {"blocked_token": _EXAMPLE_VALUE}),
            Answer(404, "No token is free.", NoneFreeAnswer, {"error": "No free tokens"}),
        ],
        refusals=STORE,
    ),
    Operation(
        method="POST",
        path="/api/keep_alive/{token}",
        id="tokenPoolKeepAlive",
        title="Keep a token alive",
        text="Renews the token for its full duration, and its lease if it is leased.",
        parameters=[Parameter("token", "The token, a UUID.", str, _EXAMPLE_VALUE)],
        answers=[
            Answer(200, "It is extended.", ResponseAnswer, {"response": "Token refreshed successfully"}),
            _INVALID,
        ],
        refusals=[NotFound, *STORE],
    ),
    Operation(
        method="DELETE",
        path="/api/token_pool",
        id="tokenPoolDelete",
        title="Delete a token",
        text="Deletes a token, also while it is leased. The field may also be called `token_uuid`.",
        body=UuidRequest,
        body_required=False,
        example={"token": _EXAMPLE_VALUE},
        answers=[
            Answer(200, "The token is deleted.", ResponseAnswer, {"response": "Token deleted successfully"}),
            _INVALID,
        ],
        refusals=[*JSON_BODY, *STORE],
    ),
]

DOCUMENTATION = Section(
    name=NAME,
    text="Compatible with token-pool: UUIDs that are leased for a while. Each path also works with a slash at its end.",
    operations=[*_OPERATIONS, *(replace(each, path=f"{each.path}/", id=f"{each.id}Slash") for each in _OPERATIONS)],
)
