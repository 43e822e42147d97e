"""/auth: a reverse proxy asks here whether it may let a request through (docs/forward-auth.md)."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple
from unicodedata import normalize
from urllib.parse import quote

from starlette.types import Receive, Scope, Send

from tokenauth.errors import Forbidden, InsufficientScope, InvalidRequest, InvalidToken, Refusal, TokenRequired
from tokenauth.logs import log, safe_traceback
from tokenauth.models import Identity, Token, is_scope
from tokenauth.tokens import Tokens
from tokenauth.web.exceptions import RetryableError
from tokenauth.web.requests import bearer, query_pairs
from tokenauth.web.responses import NO_STORE, refusal_response
from tokenauth.web.routing import Endpoint

PATH = "/auth"

_NO_LETTERS = re.compile(r"[\W_]+")
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


class _Known(NamedTuple):
    """A user as an answer names it."""

    user: Identity
    scopes: frozenset[str]
    headers: Sequence[tuple[bytes, bytes]]


class ForwardAuth(Endpoint):
    """/auth, for all methods.

    It answers 200, 401, 403 or 503 and nothing else, because proxies differ in what they make of other statuses. It
    judges the token and the scopes in the query, and ignores everything else that the client may have sent.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._known: dict[str, _Known] = {}  # one for each user, at the most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Say to a reverse proxy whether a request may pass, and who sent it; any method will do."""
        token = None
        try:
            value = bearer(scope)
            token = None if value is None else await self._tokens.validate(value)
            headers = self._judge(value, token, scope["query_string"])
        except InvalidRequest:  # two tokens were sent: then neither counts
            await refusal_response(InvalidToken())(scope, receive, send)
            return
        except Refusal as refusal:
            if token is not None:
                self._note_denied(token, refusal)
            await refusal_response(refusal)(scope, receive, send)
            return
        except Exception as error:
            log.error("unexpected", at=safe_traceback(error))
            await refusal_response(RetryableError())(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def _judge(self, value: bytes | None, token: Token | None, query: bytes) -> Sequence[tuple[bytes, bytes]]:
        """Say who may pass. Raises TokenRequired, InvalidToken, InsufficientScope or Forbidden."""
        if token is None:
            raise TokenRequired if value is None else InvalidToken
        user = self._tokens.owner(token)
        known = self._known.get(token.username)
        if known is None or known.user is not user:
            known = self._introduce(user)
        if query and not (wanted := _wanted(query)) <= known.scopes:
            raise InsufficientScope(*sorted(wanted))
        return (*known.headers, (b"x-auth-expires", b"%d" % token.expires_at))

    def _note_denied(self, token: Token, refusal: Refusal) -> None:
        """Log who may not pass. Of the scopes that were asked for only known ones are named: others may be anything."""
        lacking = refusal.scope.split(" ") if isinstance(refusal, InsufficientScope) else []
        named = " ".join(scope if self._tokens.scope_exists(scope) else "(unknown)" for scope in lacking)
        log.warning("access_denied", user=token.username, route=PATH, scope=named, reason=refusal.code)

    def _introduce(self, user: Identity) -> _Known:
        """Write a user into headers: his name percent-encoded where it is not printable ASCII."""
        name, scopes = quote(user.username, safe=_PLAIN).encode(), " ".join(user.scopes).encode()
        headers = ((b"content-length", b"0"), NO_STORE, (b"x-auth-user", name), (b"x-auth-scopes", scopes))
        known = self._known[user.username] = _Known(user, frozenset(user.scopes), headers)
        return known


@lru_cache(maxsize=256)
def _wanted(query: bytes) -> frozenset[str]:
    """Read the scopes that a query asks for; several parameters add up, so that more of them never mean less.

    Raises Forbidden for what is none, such as the nothing of an unset variable in the proxy's configuration, and for
    any other parameter: it may be a mistyped `scope`. Only `path`, and what comes after it, is the client's.
    """
    try:
        pairs = query_pairs(query)
    except InvalidRequest as error:
        raise Forbidden(str(error)) from None
    values, of_client = [], False
    for name, value in pairs:
        if name == "scope":
            values.append(value)
        elif name == "path":
            of_client = True
        elif not of_client or _almost_scope(name):
            raise Forbidden("The query has an unknown parameter: only 'scope' is known, and 'path' at its end.")
    scopes = frozenset(word for value in values for word in value.split(" "))
    if not all(map(is_scope, scopes)):
        raise Forbidden("scope: is empty or no scope. Leave it out, or name the scopes that are needed.")
    return scopes


def _almost_scope(name: str) -> bool:
    """Whether a name reads as `scope`: in other letters of the same meaning, with accents, or with signs in between."""
    letters = _NO_LETTERS.sub("", normalize("NFKD", normalize("NFKD", name).casefold()))
    return letters in {"scope", "scopes"}
