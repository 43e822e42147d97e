"""Log in, check a token, log out."""

import asyncio
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Annotated

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenauth import values
from tokenauth.errors import InvalidRequest
from tokenauth.passwords import MAX_LENGTH
from tokenauth.settings.model import MAX_NAME
from tokenauth.tokens import Tokens
from tokenauth.web import requests
from tokenauth.web.foreign_pages import Hosts
from tokenauth.web.openapi import NO_NUL, schema_only
from tokenauth.web.requests import Request
from tokenauth.web.responses import JSON, NO_STORE, JSONResponse, NoStoreResponse, error_response
from tokenauth.web.routing import Endpoint, Route

PATH = "/api/token"

_SLICE = 8 * 1024
"""Bytes that are searched in one turn of the event loop: for less than a millisecond."""

_INVALID = b'{"valid":false,"expiry_time":null}'


class Credentials(msgspec.Struct):
    """The name and the password of a user."""

    username: Annotated[str, schema_only(maxLength=MAX_NAME, pattern=NO_NUL)]
    password: Annotated[str, schema_only(maxLength=MAX_LENGTH, pattern=NO_NUL)]


class Issued(msgspec.Struct):
    """A new token, and the Unix second at which it expires."""

    token: str
    expiry_time: int


class Validity(msgspec.Struct):
    """Whether a token is valid, and if so the Unix second at which it expires."""

    valid: bool
    expiry_time: int | None


class Named(msgspec.Struct):
    """The token that is to be ended."""

    token: str


_credentials = msgspec.json.Decoder(Credentials)


class Probe(Endpoint):
    """GET /api/token, in one piece: it is as fast as the server itself (see `make bench`)."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Say whether a token is valid: the one in the query, or else in a header."""
        try:
            query: bytes = scope["query_string"]
            plain = len(query) == 70 and query.startswith(b"token=")  # as nearly all requests have it
            token = await self._tokens.validate(query[6:] if plain else _presented(scope))
        except Exception as error:
            await error_response(error)(scope, receive, send)
            return
        body = _INVALID if token is None else b'{"valid":true,"expiry_time":%d}' % token.expires_at
        await send({"type": "http.response.start", "status": 200, "headers": _headers(len(body))})
        await send({"type": "http.response.body", "body": body})


class TokenRoutes:
    """The handlers, and their route."""

    def __init__(self, tokens: Tokens, hosts: Hosts) -> None:
        self._tokens = tokens
        self._hosts = hosts

    def routes(self) -> list[Route]:
        """List the routes."""
        return [Route(PATH, {"GET": Probe(self._tokens), "POST": self.log_in, "DELETE": self.log_out})]

    async def log_in(self, request: Request) -> Response:
        """Exchange a name and a password for a token."""
        self._hosts.check(request.scope)
        body = await request.json_body(_credentials)
        issued = await self._tokens.issue(
            body.username, body.password, request.client_address, request.user_agent, request.gone
        )
        return JSONResponse(Issued(issued.value, issued.token.expires_at))

    async def log_out(self, request: Request) -> Response:
        """End the tokens that are named."""
        named = await _named(request.scope, request.receive)
        await self._tokens.log_out(named, request.client_address, request.gone)
        return NoStoreResponse(_INVALID, media_type="application/json")


@cache
def _headers(length: int) -> Sequence[tuple[bytes, bytes]]:
    """Return the headers of a probe's answer; there are only a few lengths of it."""
    return ((b"content-length", b"%d" % length), JSON, NO_STORE)


def _presented(scope: Scope) -> bytes:
    """Return the token to be probed: the query's, or else a header's."""
    value = requests.query_value(scope, "token")
    if value is not None:
        return value.encode()
    token = requests.bearer(scope)
    if token is None:
        raise InvalidRequest("Name the token to be checked: ?token=..., or an X-Token header.")
    return token


async def _named(scope: Scope, receive: Receive) -> Iterable[bytes]:
    """Find all tokens that a log-out names, in whatever form: an answer that they are not valid must be true.

    They are looked for in the query and in the body (JSON, almost JSON, a form, text, UTF-16, any of it compressed),
    and in the headers, unless query or body have another value under the name `token`: then the header only says who
    asks, and an admin who ends a token that has leaked stays logged in. The size of a request bounds their number.
    """
    data, complete = await requests.any_body(receive)
    query: bytes = scope["query_string"]
    bodies = requests.unpack(scope, data)
    found: dict[bytes, None] = {}
    for text in (query, *bodies):
        for start in range(0, len(text), _SLICE):
            if start:
                await asyncio.sleep(0)  # others have their turn
            part = text[max(0, start - values.MAX_ENCODED_LENGTH) : start + _SLICE]
            found.update(dict.fromkeys(values.find_values(part)))
    given = [*requests.values_in_form(query, "token")]
    for body in bodies:
        await asyncio.sleep(0)
        given += requests.values_in(body, "token")
    # Of a request that is cut off, who knows what else would have come.
    if complete and not any(values.find_values(value) for value in given):
        for name, held in scope["headers"]:
            if name in _CARRIERS:
                found.update(dict.fromkeys(values.find_values(held)))
    return list(found)


_CARRIERS = frozenset({b"x-token", b"authorization"})
