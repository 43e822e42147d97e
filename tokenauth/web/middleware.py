"""TokenMiddleware: requires a valid token, in this application and in any ASGI app."""

from collections.abc import Awaitable, Callable, Generator, Iterable
from typing import Any
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenauth.errors import InsufficientScope, InvalidToken, Overloaded, Refusal, TokenRequired
from tokenauth.models import ANONYMOUS, Identity, Login, Validator, is_scope
from tokenauth.web.requests import bearer
from tokenauth.web.responses import refusal_response

_DENIAL = "websocket.http.response"
_WITHOUT_BODY = frozenset({"GET", "HEAD", None})
_UNSAFE_SEGMENTS = frozenset({"", ".", ".."})


class TokenMiddleware:
    """Requires a valid token in X-Token or Authorization: Bearer, and puts it and its user into the scope.

    The guarded app finds them as `scope["token"]`, `scope["user"]` and `scope["auth"]`. A request without a valid token
    gets 401, with two different ones 400, without all of `scopes` 403, and 503 while tokens cannot be checked. A
    WebSocket gets the same denial, or is closed with 1008 where the server supports none. The app is not reached.

    `exempt` are paths that need no token, such as "/healthz", or "/public/*" for all paths below "/public/".

    Raises TypeError or ValueError for malformed `scopes` and `exempt`.
    """

    def __init__(
        self, app: ASGIApp, tokens: Validator, *, scopes: Iterable[str] = (), exempt: Iterable[str] = ()
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._scopes = frozenset(_checked("scopes", scopes, is_scope, "is not a scope"))
        paths = _checked("exempt", exempt, _is_path, "must begin with a slash")
        self._exempt = frozenset(path for path in paths if not path.endswith("/*"))
        self._exempt_below = tuple(path[:-1] for path in paths if path.endswith("/*"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one request."""
        if scope["type"] != "lifespan":
            if self._is_exempt(scope):
                scope["user"] = scope["auth"] = ANONYMOUS
                scope.pop("token", None)
            else:
                complete = scope.get("method") in _WITHOUT_BODY or _is_received(receive)
                try:
                    user, scope["token"] = await self._login(scope)
                except Refusal as refusal:
                    await _refuse(scope, receive, send, refusal)
                    return
                scope["user"] = scope["auth"] = user
                if not complete:
                    await self._with_body(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app with a request whose body may arrive much later."""
        body = _Body(scope, receive, send, self._check_again)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if body.refusal is None:
                raise
        if body.refusal is not None and not body.answered:
            await refusal_response(body.refusal)(scope, receive, send)

    async def _check_again(self, scope: Scope) -> Refusal | None:
        """Check an accepted request again; return a Refusal if its token is no longer valid."""
        user: Identity = scope["user"]
        try:
            login = await self._login(scope)
        except Refusal as refusal:
            return refusal
        if not set(user.scopes).issubset(login.user.scopes):  # the app may have looked at them already
            return Overloaded("The user's scopes changed while the request was sent. Send it again.")
        return None

    async def _login(self, scope: Scope) -> Login:
        login = await self._identify(scope)
        if login is None:
            raise InvalidToken
        if not self._scopes.issubset(login.user.scopes):
            raise InsufficientScope(*sorted(self._scopes))
        return login

    def _identify(self, scope: Scope) -> Awaitable[Login | None]:
        """Return the login that a request proves, soon; None if its token is not valid. Raises TokenRequired."""
        value = bearer(scope)
        if value is None:
            raise TokenRequired
        return self._tokens.identify(value)

    def _is_exempt(self, scope: Scope) -> bool:
        """Return whether a path, as the app sees it, needs no token. A path that contains `..` always needs one.

        Some routers cut off the prefix that they have matched (Litestar's): the path that was sent must be exempt, too.
        """
        if not self._exempt and not self._exempt_below:
            return False
        root: str = scope.get("root_path", "")
        raw: bytes | None = scope.get("raw_path")
        sent = raw and unquote(raw.partition(b"?")[0].decode("latin-1"))
        return self._matches_exempt(scope["path"], root) and (not sent or self._matches_exempt(sent, root))

    def _matches_exempt(self, path: str, root: str) -> bool:
        if root and (path == root or path.startswith(f"{root}/")):
            path = path[len(root) :]
        if path in self._exempt:
            return True
        return path.startswith(self._exempt_below) and _UNSAFE_SEGMENTS.isdisjoint(
            path[1:].removesuffix("/").split("/")
        )


def _is_received(receive: Receive) -> bool:
    """Return whether all of a body has been received. Under uvicorn, nearly all bodies have been."""
    return getattr(getattr(receive, "__self__", None), "more_body", True) is False


class _Body:
    """Wraps `receive` and `send` of a request whose body was not received at once.

    The request is authorized again when the body is complete. If it is refused then, the app sees a client that has
    disconnected, and its response is not sent.
    """

    __slots__ = ("_check", "_late", "_receive", "_scope", "_send", "answered", "refusal")

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, check: Callable[[Scope], Awaitable[Refusal | None]]
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._check = check
        self._late = False
        self.refusal: Refusal | None = None
        self.answered = False

    async def receive(self) -> Message:
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        part = _SuspensionProbe(self._receive())
        message: Message = await part
        if message["type"] == "http.request":
            self._late = self._late or part.waited
            if message.get("more_body"):
                self._late = True
            elif self._late:
                self._late = False
                self.refusal = await self._check(self._scope)
                if self.refusal is not None:
                    return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        if self.refusal is None or self.answered:
            self.answered = True
            await self._send(message)


class _SuspensionProbe(Generator[Any, Any, Message]):
    """An awaitable that records whether it had to wait."""

    __slots__ = ("_awaited", "waited")

    def __init__(self, awaitable: Awaitable[Message]) -> None:
        self._awaited = awaitable.__await__()
        self.waited = False

    def __await__(self) -> Generator[Any, Any, Message]:
        return self

    def send(self, value: Any) -> Any:
        """Resume until it waits or ends (PEP 342)."""
        found = next(self._awaited) if value is None else self._awaited.send(value)
        self.waited = True
        return found

    def throw(self, *error: Any) -> Any:
        return self._awaited.throw(*error)

    def close(self) -> None:
        self._awaited.close()


async def _refuse(scope: Scope, receive: Receive, send: Send, refusal: Refusal) -> None:
    if scope["type"] == "http" or _DENIAL in scope.get("extensions", {}):
        await refusal_response(refusal)(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008})


def _checked(argument: str, words: Iterable[str], is_valid: Callable[[str], bool], problem: str) -> tuple[str, ...]:
    if isinstance(words, str):
        raise TypeError(f"{argument}: takes a list of strings, not one string")
    checked = tuple(words)
    for word in checked:
        if not isinstance(word, str):
            raise TypeError(f"{argument}: takes a list of strings, and {word!r} is not one")
        if not is_valid(word):
            raise ValueError(f"{argument}: {word!r} {problem}")
    return checked


def _is_path(word: str) -> bool:
    return word.startswith("/")
