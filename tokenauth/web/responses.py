"""Responses: none may be stored by a cache, refusals have one form, and one table gives each its status."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

import msgspec
from starlette.responses import Response

from tokenauth import errors
from tokenauth.logs import log, safe_traceback
from tokenauth.web import exceptions
from tokenauth.web.asgi_extensions import RenderedHeaders

RawHeaders = Sequence[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
NO_STORE = (b"cache-control", b"no-store")

STATUS: dict[type[errors.Refusal], int] = {
    errors.InvalidRequest: 400,
    exceptions.InvalidScope: 400,
    exceptions.UnsupportedGrantType: 400,
    exceptions.InvalidClient: 401,
    errors.InvalidCredentials: 401,
    errors.TokenRequired: 401,
    errors.InvalidToken: 401,
    errors.Forbidden: 403,
    exceptions.ForeignOrigin: 403,
    exceptions.ForeignHost: 403,
    exceptions.ForeignPage: 403,
    errors.NotYourLease: 403,
    errors.LoginNeeded: 403,
    errors.InsufficientScope: 403,
    exceptions.NotFound: 404,
    errors.UnknownPool: 404,
    errors.UnknownToken: 404,
    errors.UnknownMember: 404,
    errors.UnknownRequest: 404,
    exceptions.MethodNotAllowed: 405,
    errors.NameTaken: 409,
    errors.TooManyTokens: 409,
    errors.AlreadyRotated: 409,
    errors.PoolFull: 409,
    errors.NoFreeToken: 409,
    errors.RequestDiffers: 409,
    errors.TooManyPlaces: 409,
    errors.PlaceLost: 409,
    errors.NotRenewable: 409,
    errors.LeaseLost: 409,
    errors.TooManyLeases: 409,
    errors.AlreadyReserved: 409,
    exceptions.BodyTooLarge: 413,
    exceptions.UnsupportedMediaType: 415,
    errors.TooManyAttempts: 429,
    exceptions.InternalError: 500,
    errors.ClientGone: 503,
    errors.Overloaded: 503,
    errors.Stopping: 503,
    errors.IssuerUnavailable: 503,
    errors.StoreUnavailable: 503,
    exceptions.RetryableInternalError: 503,
}

DESCRIPTIONS: dict[type[errors.Refusal], str] = {
    errors.TokenRequired: "Send a token in the X-Token or the Authorization: Bearer header.",
}
"""Descriptions that name a header, instead of those in tokenauth.errors."""


class NoStoreResponse(Response):
    """A response that no cache may store: nearly all contain a token, or tell whether one is valid."""

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        super().init_headers(headers)
        self.raw_headers.append(NO_STORE)


NO_CONTENT = NoStoreResponse(status_code=204)
"""A response that all requests can share: sending it does not change it."""
NO_CONTENT.raw_headers = RenderedHeaders(0, NO_CONTENT.raw_headers)  # type: ignore[assignment]  # as in JSONResponse


@lru_cache(maxsize=512)
def json_headers(length: int, *more: tuple[bytes, bytes]) -> RenderedHeaders:
    """Return the headers of a JSON document of this length."""
    return RenderedHeaders(length, [(b"content-length", b"%d" % length), JSON, NO_STORE, *more])


class JSONResponse(Response):
    """A document that msgspec encodes, and no cache may store. It costs a third of Starlette's own.

    It ends with a line break: otherwise a shell's prompt follows on the line on which curl prints it.
    """

    body: bytes
    end: ClassVar[bytes] = b"\n"

    def __init__(self, document: object, status: int = 200, headers: RawHeaders = ()) -> None:
        self.status_code = status
        self.background = None
        self.body = body = msgspec.json.encode(document) + self.end
        # Only a tuple stays as it was rendered; Starlette declares a list.
        self.raw_headers = json_headers(len(body), *headers)  # type: ignore[assignment]


class DialectResponse(JSONResponse):
    """A document as the original of a dialect sends it, byte for byte: without the line break."""

    end = b""


def refusal_response(refusal: errors.Refusal) -> Response:
    """Return the response to a refusal, with the headers of its kind (RFC 6749 section 5.2, RFC 6750 section 3)."""
    status = STATUS[type(refusal)]
    if isinstance(refusal, errors.InvalidCredentials):  # the only one that is plain text, by contract
        return NoStoreResponse("invalid credentials", status, media_type="text/plain")
    headers: RawHeaders = ()
    if isinstance(refusal, errors.TokenRequired):
        headers = [(b"www-authenticate", b'Bearer realm="tokenauth"')]
    elif isinstance(refusal, errors.InvalidToken):
        headers = [(b"www-authenticate", b'Bearer realm="tokenauth", error="invalid_token"')]
    elif isinstance(refusal, errors.InsufficientScope):
        challenge = b'Bearer realm="tokenauth", error="insufficient_scope"'
        named = b', scope="%b"' % refusal.scope.encode() if refusal.scope else b""
        headers = [(b"www-authenticate", challenge + named)]
    elif isinstance(refusal, exceptions.InvalidClient):
        headers = [(b"www-authenticate", b'Basic realm="tokenauth", charset="UTF-8"')]
    elif isinstance(refusal, exceptions.MethodNotAllowed):
        headers = [(b"allow", ", ".join(refusal.allowed).encode())]
    elif isinstance(refusal, exceptions.BodyTooLarge):
        headers = [(b"connection", b"close")]  # the rest of the body is not read
    elif isinstance(refusal, errors.RetryLater | errors.NoFreeToken) and refusal.retry_after is not None:
        headers = [(b"retry-after", b"%d" % refusal.retry_after)]
    return JSONResponse(refusal_document(refusal), status, headers)


def refusal_document(refusal: errors.Refusal) -> Mapping[str, str]:
    description = DESCRIPTIONS.get(type(refusal)) or str(refusal)
    return {"error": refusal.code, "error_description": description}


def error_response(error: Exception) -> Response:
    """Return the response to an exception: that of a refusal, or 500 for any other, which is logged."""
    if isinstance(error, errors.Refusal):
        return refusal_response(error)
    if _lacks_memory(error):
        response = refusal_response(errors.Overloaded("The server is short of memory. Try again shortly."))
        log.error("out_of_memory", at=safe_traceback(error))
        return response
    log.error("unexpected_error", at=safe_traceback(error))
    return refusal_response(exceptions.InternalError())


def _lacks_memory(error: Exception) -> bool:
    """Return whether the machine had no memory, or no process left for a thread: that may pass."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "start new thread" in str(error))
