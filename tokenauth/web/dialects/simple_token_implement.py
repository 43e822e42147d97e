"""The HTTP of simple-token-implement: N permits without names, behind one password."""

import hmac
from dataclasses import replace
from functools import wraps
from typing import Literal

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.errors import InvalidCredentials, InvalidRequest, Overloaded, StoreUnavailable, TooManyAttempts
from tokenauth.pools import Pools
from tokenauth.settings.dialects import PasswordDialectSettings
from tokenauth.throttle import Throttle
from tokenauth.web import openapi, requests
from tokenauth.web.openapi import Document, Section
from tokenauth.web.operations import Answer, Refusals, operation
from tokenauth.web.responses import answer_json
from tokenauth.web.routing import Handlers

NAME = "simple-token-implement"


class Said(msgspec.Struct):
    """What was done, how many permits are free, and the `info` that was sent."""

    message: str
    available_tokens: int
    info: str


class Available(msgspec.Struct):
    """How many permits are free."""

    available_tokens: int


class Unauthorized(msgspec.Struct):
    """The password is missing or wrong."""

    error: Literal["Unauthorized"] = "Unauthorized"


_SCHEMES = ("X-API-PASSWORD",)
_DENIED = Answer(401, Unauthorized)
_LATER: Refusals = (TooManyAttempts, Overloaded, StoreUnavailable)
_SAYS: Refusals = (*_LATER, InvalidRequest)


_INFO = openapi.Parameter("info", "A text that the answer repeats.", str, "from build 7")
_UNAUTHORIZED = openapi.Answer(401, "The password is missing or wrong.", Unauthorized, {"error": "Unauthorized"})
_SCHEME: Document = {
    "type": "apiKey",
    "in": "header",
    "name": "X-API-PASSWORD",
    "description": f"For {NAME}: the `password` of the configuration.",
}


_ISSUED = {"message": "Token issued successfully.", "available_tokens": 0, "info": "from build 7"}
_NONE_FREE = {"message": "No tokens available.", "available_tokens": 0, "info": "from build 7"}
_RECYCLED = {"message": "Token recycled successfully.", "available_tokens": 1, "info": "from build 7"}
_NONE_LEASED = {"message": "All tokens are already available.", "available_tokens": 1, "info": "from build 7"}
_OPERATIONS = [
    openapi.Operation(
        method="POST",
        path="/issue_token",
        id="simpleTokenImplementIssue",
        title="Lease a permit",
        text="Leases one of the permits, which have no names.",
        parameters=[_INFO],
        answers=[
            openapi.Answer(200, "A permit is leased.", Said, _ISSUED),
            openapi.Answer(429, "No permit is free.", Said, _NONE_FREE),
            _UNAUTHORIZED,
        ],
        refusals=_SAYS,
        security=[_SCHEMES],
    ),
    openapi.Operation(
        method="POST",
        path="/recycle_token",
        id="simpleTokenImplementRecycle",
        title="Release a permit",
        text="Ends the lease that is oldest: of your own leases, if a token is required.",
        parameters=[_INFO],
        answers=[
            openapi.Answer(200, "A permit is released.", Said, _RECYCLED),
            openapi.Answer(400, "No permit is leased.", Said, _NONE_LEASED),
            _UNAUTHORIZED,
        ],
        refusals=_SAYS,
        security=[_SCHEMES],
    ),
    openapi.Operation(
        method="POST",
        path="/tokens",
        id="simpleTokenImplementCount",
        title="Count the free permits",
        text="Returns how many permits are free.",
        answers=[
            openapi.Answer(200, "The number of free permits.", Available, {"available_tokens": 1}),
            _UNAUTHORIZED,
        ],
        refusals=_LATER,
        security=[_SCHEMES],
    ),
]

DOCUMENTATION = Section(
    name=NAME,
    text="Compatible with simple-token-implement: permits behind one password. Use `POST`: a cache or a browser may"
    " repeat a `GET`.",
    operations=[each for post in _OPERATIONS for each in (post, replace(post, method="GET", id=f"{post.id}ByGet"))],
    schemes={_SCHEMES[0]: _SCHEME},
)


class SimpleTokenImplement:
    """The handlers, and the addresses that they answer at."""

    def __init__(self, pools: Pools, terms: PasswordDialectSettings, throttle: Throttle) -> None:
        self._pools = pools
        self._pool = pools.find(terms.pool)
        self._password = terms.password.encode()
        self._throttle = throttle

    def routes(self) -> dict[str, Handlers]:
        """List the addresses: all take POST too, since a GET with an effect is unsafe behind caches."""
        addresses = {"/issue_token": self.issue, "/recycle_token": self.recycle, "/tokens": self.count}
        return {path: dict.fromkeys(("GET", "POST"), self._guard(handler)) for path, handler in addresses.items()}

    @operation(Answer(200, Said), _DENIED, Answer(429, Said), refuses=_SAYS, query={"info": str}, schemes=_SCHEMES)
    async def issue(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lend a permit."""
        info = _info(scope)
        requests.refuse_gone(scope)
        user = requests.username(scope)
        taken, left = await self._pools.acquire(self._pool, user or NAME, user)
        if taken:
            await answer_json(send, Said("Token issued successfully.", left, info))
        else:
            await answer_json(send, Said("No tokens available.", 0, info), 429)

    @operation(Answer(200, Said), _DENIED, Answer(400, Said), refuses=_SAYS, query={"info": str}, schemes=_SCHEMES)
    async def recycle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Free the permit that was issued longest ago: the user's own, where there are users."""
        info = _info(scope)
        freed, left = await self._pools.release_next(self._pool, requests.username(scope))
        if freed:
            await answer_json(send, Said("Token recycled successfully.", left, info))
        else:
            await answer_json(send, Said("All tokens are already available.", left, info), 400)

    @operation(Answer(200, Available), _DENIED, refuses=_LATER, schemes=_SCHEMES)
    async def count(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Say how many permits are free."""
        available, _ = await self._pools.count(self._pool)
        await answer_json(send, Available(available))

    def _guard(self, handler: ASGIApp) -> ASGIApp:
        @wraps(handler)
        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await self._check(scope)
            except InvalidCredentials:
                await answer_json(send, Unauthorized(), 401)
            else:
                await handler(scope, receive, send)

        return guarded

    async def _check(self, scope: Scope) -> None:
        """Count a try as a login, then compare the password. Raises InvalidCredentials or a RetryLater."""
        sent = requests.header(scope, b"x-api-password")
        if sent is None:
            raise InvalidCredentials
        address = requests.client_address(scope)
        seen = await self._throttle.permit_comparison(NAME, address)
        if seen is not None and self._right(sent):
            self._throttle.return_permit(NAME, address, seen)
            return
        gone = requests.gone(scope)
        async with self._throttle.attempt([NAME], address, gone, hashes=False, compared=seen is not None):
            if not self._right(sent):
                raise InvalidCredentials

    def _right(self, sent: bytes) -> bool:
        return hmac.compare_digest(sent.strip(b" \t"), self._password)


def _info(scope: Scope) -> str:
    return next(iter(requests.query_values(scope, "info")), "No info provided")
