"""Answers: the one form that they have, and the one table from a refusal to its answer."""

import msgspec
from starlette.types import Send

from tokenauth.errors import (
    BodyTooLarge,
    ClientGone,
    Forbidden,
    ForeignPage,
    InsufficientScope,
    InternalError,
    InvalidClient,
    InvalidCredentials,
    InvalidRequest,
    InvalidScope,
    InvalidToken,
    IssuerUnavailable,
    LeaseLost,
    MethodNotAllowed,
    NoFreeToken,
    NotFound,
    NotYourLease,
    Overloaded,
    PoolFull,
    Refusal,
    RetryLater,
    StoreUnavailable,
    TokenRequired,
    TooManyAttempts,
    UnknownPool,
    UnknownToken,
    UnsupportedGrantType,
    UnsupportedMediaType,
    Unsure,
)
from tokenauth.logs import log, whereabouts

Headers = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
NO_STORE = (b"cache-control", b"no-store")
_TEXT = (b"content-type", b"text/plain; charset=utf-8")

STATUS: dict[type[Refusal], int] = {
    InvalidRequest: 400,
    InvalidScope: 400,
    UnsupportedGrantType: 400,
    InvalidClient: 401,
    InvalidCredentials: 401,
    TokenRequired: 401,
    InvalidToken: 401,
    Forbidden: 403,
    ForeignPage: 403,
    NotYourLease: 403,
    InsufficientScope: 403,
    NotFound: 404,
    UnknownPool: 404,
    UnknownToken: 404,
    MethodNotAllowed: 405,
    PoolFull: 409,
    NoFreeToken: 409,
    LeaseLost: 409,
    BodyTooLarge: 413,
    UnsupportedMediaType: 415,
    TooManyAttempts: 429,
    InternalError: 500,
    ClientGone: 503,
    Overloaded: 503,
    IssuerUnavailable: 503,
    StoreUnavailable: 503,
    Unsure: 503,
}


async def answer(send: Send, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    """Send a whole answer; none of ours may be stored by a cache on the way."""
    about = [NO_STORE, *headers]
    if status != 204:  # RFC 9110 section 8.6: it has no content, and no length of it either
        about.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": about})
    await send({"type": "http.response.body", "body": body})


async def answer_json(send: Send, document: object, status: int = 200) -> None:
    """Send a JSON document."""
    await answer(send, status, msgspec.json.encode(document), JSON)


async def refuse(send: Send, error: Exception) -> None:
    """Answer what an endpoint raised: a refusal in the native form, anything else as the fault of this server."""
    if isinstance(error, Refusal):
        await _refuse(send, error)
    elif lacks_memory(error):
        await _refuse(send, Overloaded("The server is short of memory. Try again shortly."))
        log.error("memory_short", at=whereabouts(error))
    else:
        log.error("unexpected", at=whereabouts(error))
        await _refuse(send, InternalError())


def lacks_memory(error: Exception) -> bool:
    """Return whether the machine had no memory, or no process left for a thread: that may pass."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "start new thread" in str(error))


async def _refuse(send: Send, refusal: Refusal) -> None:
    """Send a refusal, with the headers that its kind asks for (RFC 6749 section 5.2, RFC 6750 section 3)."""
    status = STATUS[type(refusal)]
    if isinstance(refusal, InvalidCredentials):  # the wire contract has this one in plain text
        await answer(send, status, b"invalid credentials", _TEXT)
        return
    headers: Headers = [JSON]
    if isinstance(refusal, TokenRequired):
        headers.append((b"www-authenticate", b'Bearer realm="tokenauth"'))
    elif isinstance(refusal, InvalidToken):
        headers.append((b"www-authenticate", b'Bearer realm="tokenauth", error="invalid_token"'))
    elif isinstance(refusal, InsufficientScope):
        challenge = b'Bearer realm="tokenauth", error="insufficient_scope", scope="%s"'
        headers.append((b"www-authenticate", challenge % refusal.scope.encode()))
    elif isinstance(refusal, InvalidClient):
        headers.append((b"www-authenticate", b'Basic realm="tokenauth", charset="UTF-8"'))
    elif isinstance(refusal, MethodNotAllowed):
        headers.append((b"allow", ", ".join(refusal.allowed).encode()))
    elif isinstance(refusal, BodyTooLarge):
        headers.append((b"connection", b"close"))  # rather than read the rest
    elif isinstance(refusal, RetryLater | NoFreeToken) and refusal.retry_after is not None:
        headers.append((b"retry-after", b"%d" % refusal.retry_after))
    document = {"error": refusal.code, "error_description": str(refusal)}
    await answer(send, status, msgspec.json.encode(document), *headers)
