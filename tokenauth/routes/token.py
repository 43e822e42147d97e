"""/api/token: log in, probe, log out. The hot path of the product: plain ASGI, no router, no request object."""

import msgspec
from starlette.types import Receive, Scope, Send

from tokenauth import opaque
from tokenauth.errors import InvalidRequest, MethodNotAllowed
from tokenauth.routes import requests
from tokenauth.routes.refusals import JSON, NO_STORE, answer, answer_json
from tokenauth.tokens import Tokens

_INVALID = b'{"valid":false,"expiry_time":null}'


class _Credentials(msgspec.Struct):
    username: str
    password: str


class _Issued(msgspec.Struct):
    token: str
    expiry_time: int


_credentials = msgspec.json.Decoder(_Credentials)


class TokenEndpoint:
    """ASGI app of one address: POST logs in, GET probes, DELETE logs out."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        method = scope["method"]
        if method in {"GET", "HEAD"}:
            await self._probe(scope, send)
        elif method == "POST":
            await self._log_in(scope, receive, send)
        elif method == "DELETE":
            await self._log_out(scope, receive, send)
        else:
            raise MethodNotAllowed(("GET", "HEAD", "POST", "DELETE"))

    async def _probe(self, scope: Scope, send: Send) -> None:
        query: bytes = scope["query_string"]
        plain = len(query) == 70 and query.startswith(b"token=")  # as nearly all requests have it
        value = query[6:] if plain else _presented(scope)
        token = await self._tokens.validate(value)
        body = _INVALID if token is None else b'{"valid":true,"expiry_time":%d}' % token.expires_at
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": 200, "headers": [length, JSON, NO_STORE]})
        await send({"type": "http.response.body", "body": body})

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = await requests.json_body(scope, receive, _credentials)
        issued = await self._tokens.issue(
            wanted.username, wanted.password, requests.client_address(scope), requests.user_agent(scope)
        )
        await answer_json(send, _Issued(issued.value, issued.token.expires_at))

    async def _log_out(self, scope: Scope, receive: Receive, send: Send) -> None:
        for value in await _named(scope, receive):
            await self._tokens.withhold(value)
        await answer(send, 200, _INVALID, JSON)


def _presented(scope: Scope) -> bytes:
    """Return the token to be probed: the query's, or else a header's."""
    value = requests.query_value(scope, "token")
    if value is not None:
        return value.encode()
    token = requests.bearer(scope)
    if token is None:
        raise InvalidRequest("Name the token to be checked: ?token=..., or an X-Token header.")
    return token


async def _named(scope: Scope, receive: Receive) -> list[bytes]:
    """Find the tokens that a log-out names, in whatever form: nobody may believe in vain that he has logged out.

    They are looked for in the body (JSON, almost JSON, a form, UTF-16) and in the query; else in the headers.
    """
    data, _ = await requests.body(receive)
    values = opaque.find_values(data.replace(b"\0", b"")) + opaque.find_values(scope["query_string"])
    if values:
        return values
    return [value for name, held in scope["headers"] if name in _CARRIERS for value in opaque.find_values(held)]


_CARRIERS = frozenset({b"x-token", b"authorization"})
