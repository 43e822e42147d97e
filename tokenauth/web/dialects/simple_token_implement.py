"""The HTTP of simple-token-implement: permits without names, behind one password."""

import hmac
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import msgspec
from starlette.responses import Response

from tokenauth.errors import InvalidCredentials, InvalidRequest, Refusal, TooManyAttempts
from tokenauth.service import Service
from tokenauth.settings.dialects import DialectSettings, PasswordDialectSettings
from tokenauth.web.openapi import STORE, Answer, Document, Operation, Parameter, Section
from tokenauth.web.requests import Request
from tokenauth.web.responses import DialectResponse
from tokenauth.web.routing import Handler, Handlers, when_complete

NAME = "simple-token-implement"


class PermitAnswer(msgspec.Struct):
    message: str
    available_tokens: int
    info: str


class AvailableAnswer(msgspec.Struct):
    available_tokens: int


class UnauthorizedAnswer(msgspec.Struct):
    error: Literal["Unauthorized"] = "Unauthorized"


class SimpleTokenImplement:
    def __init__(self, service: Service, settings: DialectSettings) -> None:
        assert isinstance(settings, PasswordDialectSettings)
        self._pools = service.pools
        self._pool = service.pools.find(settings.pool)
        self._password = settings.password.encode()
        self._throttle = service.throttle

    def handlers(self) -> dict[str, Handlers]:
        """Return the handlers of each path below the prefix. All take POST, too: caches may repeat a GET."""
        handlers = {"/issue_token": self.issue, "/recycle_token": self.recycle, "/tokens": self.count}
        return {
            path: dict.fromkeys(("GET", "POST"), when_complete(self._guarded(handler)))
            for path, handler in handlers.items()
        }

    async def issue(self, request: Request) -> Response:
        info = _info(request)
        request.raise_if_disconnected()
        leased, left = await self._pools.acquire(self._pool, request.username or NAME, request.username)
        if not leased:
            return DialectResponse(PermitAnswer("No tokens available.", 0, info), 429)
        return DialectResponse(PermitAnswer("Token issued successfully.", left, info))

    async def recycle(self, request: Request) -> Response:
        """Release the oldest lease; where a token is required, the oldest lease of its user."""
        info = _info(request)
        released, left = await self._pools.release_next(self._pool, request.username)
        if not released:
            return DialectResponse(PermitAnswer("All tokens are already available.", left, info), 400)
        return DialectResponse(PermitAnswer("Token recycled successfully.", left, info))

    async def count(self, request: Request) -> Response:
        available, _ = await self._pools.count(self._pool)
        return DialectResponse(AvailableAnswer(available))

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            try:
                await self._check_password(request)
            except InvalidCredentials:
                return DialectResponse(UnauthorizedAnswer(), 401)
            return await handler(request)

        return guarded

    async def _check_password(self, request: Request) -> None:
        """Count an attempt, as for a login, before the password is compared.

        Raises InvalidCredentials or a RetryLater.
        """
        sent = request.header(b"x-api-password")
        if sent is None:
            raise InvalidCredentials
        address = request.client_address
        permit = await self._throttle.permit_comparison(NAME, address)
        if permit is not None and self._matches(sent):
            self._throttle.return_permit(NAME, address, permit)
            return
        compared = permit is not None
        async with self._throttle.attempt([NAME], address, request.disconnect_check, hashes=False, compared=compared):
            if not self._matches(sent):
                raise InvalidCredentials

    def _matches(self, sent: bytes) -> bool:
        return hmac.compare_digest(sent.strip(b" \t"), self._password)


def _info(request: Request) -> str:
    return next(iter(request.query_values("info")), "No info provided")


_SCHEMES = ("X-API-PASSWORD",)
_LATER: Sequence[type[Refusal]] = (TooManyAttempts, *STORE)
_INFO = Parameter("info", "A text that the answer repeats.", str, "from build 7")
_UNAUTHORIZED = Answer(401, "The password is missing or wrong.", UnauthorizedAnswer, {"error": "Unauthorized"})
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
    Operation(
        method="POST",
        path="/issue_token",
        id="simpleTokenImplementIssue",
        title="Lease a permit",
        text="Leases one of the permits, which have no names.",
        parameters=[_INFO],
        answers=[
            Answer(200, "A permit is leased.", PermitAnswer, _ISSUED),
            Answer(429, "No permit is free.", PermitAnswer, _NONE_FREE),
            _UNAUTHORIZED,
        ],
        refusals=[*_LATER, InvalidRequest],
        security=[_SCHEMES],
    ),
    Operation(
        method="POST",
        path="/recycle_token",
        id="simpleTokenImplementRecycle",
        title="Release a permit",
        text="Ends the lease that is oldest: of your own leases, if a token is required.",
        parameters=[_INFO],
        answers=[
            Answer(200, "A permit is released.", PermitAnswer, _RECYCLED),
            Answer(400, "No permit is leased.", PermitAnswer, _NONE_LEASED),
            _UNAUTHORIZED,
        ],
        refusals=[*_LATER, InvalidRequest],
        security=[_SCHEMES],
    ),
    Operation(
        method="POST",
        path="/tokens",
        id="simpleTokenImplementCount",
        title="Count the free permits",
        text="Returns how many permits are free.",
        answers=[Answer(200, "The number of free permits.", AvailableAnswer, {"available_tokens": 1}), _UNAUTHORIZED],
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
