"""Log in, check a token, log out."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import msgspec
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenauth import values
from tokenauth.errors import InvalidRequest
from tokenauth.metrics import ValidationCounts
from tokenauth.models import Token
from tokenauth.passwords import MAX_LENGTH
from tokenauth.settings.model import MAX_NAME
from tokenauth.tokens import Tokens
from tokenauth.web.asgi_extensions import AnswerAtOnce
from tokenauth.web.csrf import Hosts
from tokenauth.web.http_context import set_current_request
from tokenauth.web.logout_tokens import find_logout_tokens
from tokenauth.web.openapi import NO_NUL, schema_only
from tokenauth.web.requests import Request, bearer
from tokenauth.web.responses import JSONResponse, error_response, json_headers
from tokenauth.web.routing import Endpoint, Route, strict

PATH = "/api/token"
RENEW = f"{PATH}/renew"


class LogInRequest(msgspec.Struct):
    username: Annotated[str, schema_only(maxLength=MAX_NAME, pattern=NO_NUL)]
    password: Annotated[str, schema_only(maxLength=MAX_LENGTH, pattern=NO_NUL)]


class TokenAnswer(msgspec.Struct):
    token: str
    expiry_time: int


class ValidityAnswer(msgspec.Struct):
    valid: bool
    expiry_time: int | None


class RenewedAnswer(msgspec.Struct, kw_only=True):
    valid: Literal[True] = True
    expiry_time: int
    max_expiry_time: int


class LogOutRequest(msgspec.Struct):
    token: str


_NOT_VALID = JSONResponse(ValidityAnswer(valid=False, expiry_time=None))
"""The answer to each log-out, which all requests can share; its body also answers a check of such a token."""

_log_in_decoder = msgspec.json.Decoder(LogInRequest)


_DIGEST = "tokenauth.digest"
"""The key of a request's scope under which `at_once` leaves the digest of the token in the query: it takes a while."""


class CheckToken(Endpoint):
    """GET /api/token: is a token valid? A plain ASGI app, since a handler would cost 4 % of the throughput."""

    def __init__(self, tokens: Tokens, counts: ValidationCounts) -> None:
        self._tokens = tokens
        self._counts = counts

    def at_once(self, scope: Scope) -> AnswerAtOnce | None:
        """Answer without waiting, if that is possible and nothing else is asked for: as nearly always."""
        query: bytes = scope["query_string"]
        value = bearer(scope) if not query else query[6:] if _is_only_token(query) else None
        digest = None if value is None else values.digest(value)
        if digest is None:
            return None
        if self._tokens.can_validate_now(digest):
            return partial(self._answer, digest)
        if query:
            scope[_DIGEST] = digest
        return None

    def _answer(self, digest: bytes) -> tuple[bytes, bytes]:
        body = self._body(self._tokens.validate_now(digest))
        return json_headers(len(body)).lines, body

    def _body(self, token: Token | None) -> bytes:
        if token is None:
            self._counts.invalid += 1
            return _NOT_VALID.body
        self._counts.valid += 1
        return b'{"valid":true,"expiry_time":%d}\n' % token.expires_at

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send whether the token of the query, or else of a header, is valid."""
        try:
            query: bytes = scope["query_string"]
            if _is_only_token(query):
                token = await self._tokens.validate(query[6:], digest=scope.get(_DIGEST))
            else:
                request = Request(scope)
                token = await self._tokens.validate(_find_token(request), request.counts_as_use())
        except Exception as error:
            self._counts.refuse(error)
            set_current_request(scope)
            await error_response(error)(scope, receive, send)
            return
        body = self._body(token)
        await send({"type": "http.response.start", "status": 200, "headers": json_headers(len(body))})
        await send({"type": "http.response.body", "body": body})


def _is_only_token(query: bytes) -> bool:
    """Return whether a query is just what can be a token, as in nearly all requests."""
    return len(query) == 70 and query.startswith(b"token=")


class TokenRoutes:
    def __init__(self, tokens: Tokens, hosts: Hosts, counts: ValidationCounts) -> None:
        self._tokens = tokens
        self._counts = counts
        self._hosts = hosts

    def routes(self, with_token: Sequence[Middleware]) -> list[Route]:
        """List the routes; `with_token` guards what needs a token."""
        return [
            Route(PATH, {"GET": CheckToken(self._tokens, self._counts), "POST": self.log_in, "DELETE": self.log_out}),
            Route(RENEW, {"POST": strict(self.renew)}, with_token),
        ]

    async def log_in(self, request: Request) -> Response:
        self._hosts.check(request.scope)
        body = await request.json_body(_log_in_decoder)
        issued = await self._tokens.issue(
            body.username, body.password, request.client_address, request.user_agent, request.disconnect_check
        )
        return JSONResponse(TokenAnswer(issued.value, issued.token.expires_at))

    async def renew(self, request: Request) -> Response:
        token = await self._tokens.uses.renew(request.token)
        assert token.max_expires_at is not None
        return JSONResponse(RenewedAnswer(expiry_time=token.expires_at, max_expiry_time=token.max_expires_at))

    async def log_out(self, request: Request) -> Response:
        tokens = await find_logout_tokens(request)
        await self._tokens.log_out(tokens, request.client_address, request.disconnect_check)
        return _NOT_VALID


def _find_token(request: Request) -> bytes:
    """Return the token of the query, or else of a header."""
    value = request.query_value("token")
    if value is not None:
        return value.encode()
    token = request.bearer()
    if token is None:
        raise InvalidRequest("Send the token to check: ?token=..., or an X-Token header.")
    return token
