"""/auth: a reverse proxy asks here whether it may let a request through (docs/forward-auth.md)."""

from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import quote

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.errors import (
    Forbidden,
    InsufficientScope,
    InvalidRequest,
    InvalidToken,
    Refusal,
    StoreUnavailable,
    TokenRequired,
    Unsure,
)
from tokenauth.logs import log, whereabouts
from tokenauth.models import Identity, Login, is_scope
from tokenauth.routes import requests
from tokenauth.routes.operations import Answer, operation
from tokenauth.routes.refusals import NO_STORE, Headers, refuse
from tokenauth.routes.table import Handlers, nothing_here
from tokenauth.tokens import Tokens

PATH = "/auth"

_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


_IDENTITY = {
    "X-Auth-User": "The user's name, percent-encoded where it is not printable ASCII.",
    "X-Auth-Scopes": "His scopes, with blanks between them.",
    "X-Auth-Expires": "The Unix second at which his token expires.",
}


class ForwardAuth:
    """ASGI app that answers /auth, whatever the method, and passes everything else on.

    It answers 200, 401, 403 or 503 and nothing else, since proxies make of other answers what they like. It judges
    the token and the scopes that the query asks for, and looks at nothing else that the client may have sent.
    """

    def __init__(self, tokens: Tokens, rest: ASGIApp = nothing_here) -> None:
        self._tokens = tokens
        self._rest = rest

    def routes(self) -> dict[str, Handlers]:
        """List the address."""
        return {PATH: {"GET": self.__call__}}

    @operation(
        Answer(200, says="The request may pass.", headers=_IDENTITY),
        refuses=(TokenRequired, InvalidToken, InsufficientScope, Forbidden, StoreUnavailable, Unsure),
        query={"scope": str},
        schemes=("X-Token", "Bearer"),
    )
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Say to a reverse proxy whether a request may pass, and who sent it; any method will do."""
        if scope["type"] != "http" or scope["path"] != PATH:
            await self._rest(scope, receive, send)
            return
        try:
            user, token = await self._judge(scope)
            expires = (b"x-auth-expires", b"%d" % token.expires_at)
            headers: Headers = [*_names(user), expires, NO_STORE, (b"content-length", b"0")]
        except Refusal as refusal:
            await refuse(send, refusal)
            return
        except Exception as error:
            log.error("unexpected", at=whereabouts(error))
            await refuse(send, Unsure())
            return
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def _judge(self, scope: Scope) -> Login:
        """Return who may pass. Raises TokenRequired, InvalidToken, InsufficientScope, Forbidden, or a RetryLater."""
        try:
            value = requests.bearer(scope)
        except InvalidRequest:  # two different tokens: neither counts
            raise InvalidToken from None
        if value is None:
            raise TokenRequired
        login = await self._tokens.identify(value)
        if login is None:
            raise InvalidToken
        query = scope["query_string"]
        if query:
            wanted = _wanted(query)
            if not wanted.issubset(login.user.scopes):
                raise InsufficientScope(*sorted(wanted))
        return login


@lru_cache(maxsize=256)
def _names(user: Identity) -> Sequence[tuple[bytes, bytes]]:
    """Write a user into headers: his name percent-encoded where it is not printable ASCII, his scopes with blanks."""
    name = quote(user.username, safe=_PLAIN).encode()
    return ((b"x-auth-user", name), (b"x-auth-scopes", " ".join(user.scopes).encode()))


@lru_cache(maxsize=256)
def _wanted(query: bytes) -> frozenset[str]:
    """Read the scopes that a query asks for; several parameters add up, so that more of them never mean less.

    Raises Forbidden for what is none, such as the nothing of an unset variable in the proxy's configuration.
    """
    try:
        values = requests.query_values({"query_string": query}, "scope")
    except InvalidRequest as error:
        raise Forbidden(str(error)) from None
    scopes = frozenset(word for value in values for word in value.split(" "))
    if not all(map(is_scope, scopes)):
        raise Forbidden("scope: is empty or no scope. Leave it out, or name the scopes that are needed.")
    return scopes
