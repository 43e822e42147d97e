"""/auth: tells a reverse proxy whether to let a request pass (docs/forward-auth.md)."""

import re
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple
from unicodedata import normalize
from urllib.parse import quote

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenauth import values
from tokenauth.errors import Forbidden, InsufficientScope, InvalidRequest, InvalidToken, Refusal, TokenRequired
from tokenauth.logs import log, safe_traceback
from tokenauth.metrics import ValidationCounts
from tokenauth.models import Identity, Token, is_scope
from tokenauth.tokens import Tokens
from tokenauth.web.asgi_extensions import AnswerAtOnce
from tokenauth.web.browser_auth import BrowserAuth, Headers
from tokenauth.web.error_handling import log_denied
from tokenauth.web.exceptions import RetryableInternalError
from tokenauth.web.http_context import set_current_request
from tokenauth.web.requests import bearer, header_token, query_pairs
from tokenauth.web.responses import NO_STORE, refusal_response
from tokenauth.web.routing import Endpoint

PATH = "/auth"

_NO_LETTERS = re.compile(r"[\W_]+")
_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


class _Response(NamedTuple):
    """What is sent for a user, except the time at which the token expires."""

    user: Identity
    scopes: frozenset[str]
    headers: Sequence[tuple[bytes, bytes]]
    lines: bytes


class _Query(NamedTuple):
    """What the configuration of the proxy asks for. With a `problem`, no request may pass."""

    scopes: frozenset[str] = frozenset()
    cookie: bool = False
    redirect: bool = False
    x_token_only: bool = False
    touch: bool = True
    problem: str = ""


_EMPTY = _Query()

_INVALID = "tokenauth.invalid"
"""A key of the scope of a request whose token `at_once` has found to be invalid: it is not looked up again."""


class ForwardAuth(Endpoint):
    """/auth, for all methods. An ASGI app: as a handler it would lose 4 % of its rate.

    It sends only 200, 401, 403 and 503, because proxies differ in how they treat others; with `login=redirect` also
    302. It checks the token and the scopes in the query, and ignores everything else that the client sent.
    """

    def __init__(self, tokens: Tokens, counts: ValidationCounts, browser: BrowserAuth | None = None) -> None:
        """Create it. `browser` has the rules for cookies; without it, queries that ask for them are malformed."""
        self._tokens = tokens
        self._counts = counts
        self._browser = browser
        self._responses: dict[str, _Response] = {}  # at most one for each user, with all of their scopes

    def at_once(self, scope: Scope) -> AnswerAtOnce | None:
        """Answer for a valid token, without waiting. Both this and the answer raise the error of what may not pass."""
        asked = self._asked(scope)
        value, cookie_headers = self._find_token(scope, asked)
        digest = values.digest(value) if value is not None and asked.touch else None
        if digest is None or not self._tokens.can_validate_now(digest):
            return None
        return partial(self._answer, scope, asked, digest, cookie_headers)

    def _answer(
        self, scope: Scope, asked: _Query, digest: bytes, cookie_headers: Headers | None
    ) -> tuple[bytes, bytes] | None:
        token = self._tokens.validate_now(digest)
        if token is None:
            scope[_INVALID] = True
            return None
        response = self._check(None, token, asked)
        self._check_page(scope, cookie_headers)
        self._counts.valid += 1
        return b"%bx-auth-expires: %d\r\n" % (response.lines, token.expires_at), b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send 200 and the user's name if the request may pass."""
        token, asked = None, _EMPTY
        try:
            asked = self._asked(scope)
            value, cookie_headers = self._find_token(scope, asked)
            if value is not None and _INVALID not in scope:
                token = await self._tokens.validate(value, asked.touch)
            response = self._check(value, token, asked)
            self._check_page(scope, cookie_headers)
        except Exception as error:
            self._counts.refuse(error)
            await self._refuse(scope, error, token, asked)(scope, receive, send)
            return
        assert token is not None
        self._counts.valid += 1
        headers = (*response.headers, (b"x-auth-expires", b"%d" % token.expires_at))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def _asked(self, scope: Scope) -> _Query:
        query = scope["query_string"]
        return _parse(query, self._browser is not None) if query else _EMPTY

    def _find_token(self, scope: Scope, asked: _Query) -> tuple[bytes | None, Headers | None]:
        """Return the token; and the headers if it is from a cookie. Raises InvalidRequest or InvalidToken."""
        if asked.cookie and self._browser is not None:
            return self._browser.find_token(scope, asked.x_token_only)
        return (bearer(scope) if asked is _EMPTY else header_token(scope, asked.x_token_only)), None

    def _check_page(self, scope: Scope, cookie_headers: Headers | None) -> None:
        if cookie_headers is not None and self._browser is not None:
            self._browser.check_page(scope, cookie_headers)

    def _refuse(self, scope: Scope, error: Exception, token: Token | None, asked: _Query) -> Response:
        """Return the response to a request that may not pass. Errors in here do not let it pass either."""
        set_current_request(scope)
        try:
            if isinstance(error, TokenRequired | InvalidToken | InvalidRequest):
                refusal = InvalidToken() if isinstance(error, InvalidRequest) else error  # two different tokens
                if asked.cookie and self._browser is not None:
                    cookie_read = not _has_token(scope, asked.x_token_only)
                    return self._browser.log_in_response(refusal, scope, asked.redirect, cookie_read)
                return refusal_response(refusal)
            if isinstance(error, Refusal):
                if token is not None:
                    scope["token"] = token
                    self._log_denied(token, error)
                return refusal_response(error)
        except Exception as unexpected:
            error = unexpected
        log.error("unexpected_error", at=safe_traceback(error))
        return refusal_response(RetryableInternalError())

    def _check(self, value: bytes | None, token: Token | None, asked: _Query) -> _Response:
        """Return what is sent for the user. Raises TokenRequired, InvalidToken, InsufficientScope or Forbidden."""
        if token is None:
            raise TokenRequired if value is None else InvalidToken
        response = self._response_for(token)
        if asked is not _EMPTY:
            if asked.problem:
                raise Forbidden(asked.problem)
            if not asked.scopes <= response.scopes:
                raise InsufficientScope(*sorted(asked.scopes))
        return response

    def _response_for(self, token: Token) -> _Response:
        user = self._tokens.owner(token)
        if token.scopes is not None:
            return _limited_response(user)
        response = self._responses.get(token.username)
        if response is None or response.user is not user:
            response = self._responses[user.username] = _response(user)
        return response

    def _log_denied(self, token: Token, refusal: Refusal) -> None:
        """Log who may not pass, and what is wrong with the query: the client may get a page of the proxy only."""
        asked = refusal.scope.split(" ") if isinstance(refusal, InsufficientScope) else []
        log_denied(token.username, PATH, refusal, self._tokens.known_scopes(asked))


def _has_token(scope: Scope, x_token_only: bool) -> bool:
    try:
        return header_token(scope, x_token_only) is not None
    except InvalidRequest:  # two different ones
        return True


def _response(user: Identity) -> _Response:
    name, scopes = quote(user.username, safe=_PLAIN).encode(), " ".join(user.scopes).encode()
    headers = ((b"content-length", b"0"), NO_STORE, (b"x-auth-user", name), (b"x-auth-scopes", scopes))
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    return _Response(user, frozenset(user.scopes), headers, lines)


_limited_response = lru_cache(maxsize=1024)(_response)
"""The same for tokens that are limited to some of the user's scopes."""


@lru_cache(maxsize=256)
def _parse(query: bytes, browsers: bool) -> _Query:
    """Return what a query asks for. Scopes of several parameters add up.

    A problem is a malformed scope, such as the empty value of an unset variable of the proxy, and any other parameter,
    which may be a misspelt `scope`. Only `path` and what follows it come from the client. `browsers`: whether there is
    a login page; without one, `cookie`, `login` and `header` are unknown. `touch=0`: this does not count as a use.
    """
    try:
        pairs = query_pairs(query)
    except InvalidRequest as error:  # the client can make it too long, but not change what comes before `path`
        before, has_path, _ = query.partition(b"&path=")
        return (_parse(before, browsers) if has_path else _EMPTY)._replace(problem=str(error))
    values, switches, problem, from_client = [], set(), "", False
    for name, value in pairs:
        if name == "scope":
            values.append(value)
        elif name == "path":
            from_client = True
        elif not from_client and (browsers or name == "touch") and _SWITCHES.get(name) == value:
            switches.add(name)
        elif not from_client or _resembles_scope(name):
            problem = problem or _unknown(name, browsers)
    scopes = frozenset(word for value in values for word in value.split(" "))
    if not all(map(is_scope, scopes)):
        problem = problem or "scope: is empty or malformed. Leave it out, or name the required scopes."
    if "login" in switches and "cookie" not in switches:
        problem = problem or "login=redirect needs 'cookie', too."
    cookie, redirect, x_token_only, touch = (name in switches for name in ("cookie", "login", "header", "touch"))
    return _Query(scopes, cookie, redirect, x_token_only, not touch, problem)


_SWITCHES = {"cookie": "", "login": "redirect", "header": "x-token", "touch": "0"}


def _unknown(name: str, browsers: bool) -> str:
    if name in _SWITCHES:
        shown = f"{name}={_SWITCHES[name]}".rstrip("=")
        problem = (
            f"may only be {shown!r}"
            if browsers or name == "touch"
            else f"{shown!r} needs browser.url in the configuration"
        )
        return f"The query has {name!r}: {problem}."
    return "The query has an unknown parameter: only 'scope' and 'touch' are known, and 'path' at its end."


def _resembles_scope(name: str) -> bool:
    """Return whether a name looks like `scope`, with look-alike letters, accents or punctuation in it."""
    letters = _NO_LETTERS.sub("", normalize("NFKD", normalize("NFKD", name).casefold()))
    return letters in {"scope", "scopes"}
