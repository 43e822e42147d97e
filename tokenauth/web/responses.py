"""Responses: none may be stored by a cache, refusals have one form, and one table gives each its status."""

from collections.abc import Mapping, Sequence

import msgspec
from starlette.responses import Response

from tokenauth.errors import (
    AlreadyRotated,
    ClientGone,
    Forbidden,
    InsufficientScope,
    InvalidCredentials,
    InvalidRequest,
    InvalidToken,
    IssuerUnavailable,
    LeaseLost,
    LoginNeeded,
    NameTaken,
    NoFreeToken,
    NotRenewable,
    NotYourLease,
    Overloaded,
    PoolFull,
    Refusal,
    RetryLater,
    Stopping,
    StoreUnavailable,
    TokenRequired,
    TooManyAttempts,
    TooManyTokens,
    UnknownPool,
    UnknownToken,
)
from tokenauth.logs import log, safe_traceback
from tokenauth.web.exceptions import (
    BodyTooLarge,
    ForeignOrigin,
    ForeignPage,
    InternalError,
    InvalidClient,
    InvalidScope,
    MethodNotAllowed,
    NotFound,
    RetryableInternalError,
    UnsupportedGrantType,
    UnsupportedMediaType,
)

RawHeaders = Sequence[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
NO_STORE = (b"cache-control", b"no-store")

STATUS: dict[type[Refusal], int] = {
    InvalidRequest: 400,
    InvalidScope: 400,
    UnsupportedGrantType: 400,
    InvalidClient: 401,
    InvalidCredentials: 401,
    TokenRequired: 401,
    InvalidToken: 401,
    Forbidden: 403,
    ForeignOrigin: 403,
    ForeignPage: 403,
    NotYourLease: 403,
    LoginNeeded: 403,
    InsufficientScope: 403,
    NotFound: 404,
    UnknownPool: 404,
    UnknownToken: 404,
    MethodNotAllowed: 405,
    NameTaken: 409,
    TooManyTokens: 409,
    AlreadyRotated: 409,
    PoolFull: 409,
    NoFreeToken: 409,
    NotRenewable: 409,
    LeaseLost: 409,
    BodyTooLarge: 413,
    UnsupportedMediaType: 415,
    TooManyAttempts: 429,
    InternalError: 500,
    ClientGone: 503,
    Overloaded: 503,
    Stopping: 503,
    IssuerUnavailable: 503,
    StoreUnavailable: 503,
    RetryableInternalError: 503,
}

DESCRIPTIONS: dict[type[Refusal], str] = {
    TokenRequired: "Send a token in the X-Token or the Authorization: Bearer header.",
    TooManyAttempts: "Too many failed logins. Wait for as many seconds as Retry-After says.",
}
"""Descriptions that name a header, instead of those in tokenauth.errors."""


class NoStoreResponse(Response):
    """A response that no cache may store: nearly all contain a token, or tell whether one is valid."""

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        """Add Cache-Control to the headers."""
        super().init_headers(headers)
        self.raw_headers.append(NO_STORE)


NO_CONTENT = NoStoreResponse(status_code=204)
"""A response that all requests can share: sending it does not change it."""


class JSONResponse(Response):
    """A document that msgspec encodes, and no cache may store. It costs a third of Starlette's own."""

    def __init__(self, document: object, status: int = 200, headers: RawHeaders = ()) -> None:
        self.status_code = status
        self.background = None
        self.body = body = msgspec.json.encode(document)
        self.raw_headers = [(b"content-length", b"%d" % len(body)), JSON, NO_STORE, *headers]


def refusal_response(refusal: Refusal) -> Response:
    """Return the response to a refusal, with the headers of its kind (RFC 6749 section 5.2, RFC 6750 section 3)."""
    status = STATUS[type(refusal)]
    if isinstance(refusal, InvalidCredentials):  # the only one that is plain text, by contract
        return NoStoreResponse("invalid credentials", status, media_type="text/plain")
    headers: RawHeaders = ()
    if isinstance(refusal, TokenRequired):
        headers = [(b"www-authenticate", b'Bearer realm="tokenauth"')]
    elif isinstance(refusal, InvalidToken):
        headers = [(b"www-authenticate", b'Bearer realm="tokenauth", error="invalid_token"')]
    elif isinstance(refusal, InsufficientScope):
        challenge = b'Bearer realm="tokenauth", error="insufficient_scope"'
        named = b', scope="%b"' % refusal.scope.encode() if refusal.scope else b""
        headers = [(b"www-authenticate", challenge + named)]
    elif isinstance(refusal, InvalidClient):
        headers = [(b"www-authenticate", b'Basic realm="tokenauth", charset="UTF-8"')]
    elif isinstance(refusal, MethodNotAllowed):
        headers = [(b"allow", ", ".join(refusal.allowed).encode())]
    elif isinstance(refusal, BodyTooLarge):
        headers = [(b"connection", b"close")]  # the rest of the body is not read
    elif isinstance(refusal, RetryLater | NoFreeToken) and refusal.retry_after is not None:
        headers = [(b"retry-after", b"%d" % refusal.retry_after)]
    return JSONResponse(refusal_document(refusal), status, headers)


def refusal_document(refusal: Refusal) -> Mapping[str, str]:
    """Return the body of the response to a refusal."""
    description = DESCRIPTIONS.get(type(refusal)) or str(refusal)
    return {"error": refusal.code, "error_description": description}


def error_response(error: Exception) -> Response:
    """Return the response to an exception: that of a refusal, or 500 for any other, which is logged."""
    if isinstance(error, Refusal):
        return refusal_response(error)
    if _lacks_memory(error):
        response = refusal_response(Overloaded("The server is short of memory. Try again shortly."))
        log.error("out_of_memory", at=safe_traceback(error))
        return response
    log.error("unexpected_error", at=safe_traceback(error))
    return refusal_response(InternalError())


def _lacks_memory(error: Exception) -> bool:
    """Return whether the machine had no memory, or no process left for a thread: that may pass."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "start new thread" in str(error))
