"""TokenMiddleware: lets through whoever sends a valid token, in this app and in anybody's ASGI app."""

from collections.abc import Awaitable, Callable, Generator, Iterable
from typing import Any, cast
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenauth.errors import InsufficientScope, InvalidToken, Overloaded, Refusal, TokenRequired
from tokenauth.models import ANONYMOUS, Identity, Login, Validator, is_scope
from tokenauth.web.requests import bearer
from tokenauth.web.responses import refusal_response

_DENIAL = "websocket.http.response"
_WITHOUT_BODY = frozenset({"GET", "HEAD", None})
_NOWHERE = frozenset({"", ".", ".."})


class TokenMiddleware:
    """Reads X-Token or Authorization: Bearer, and puts the token and its user into the scope.

    The guarded app finds them as `scope["token"]`, `scope["user"]` and `scope["auth"]`. Whoever sends no valid token
    is answered 400, 401 or 503 in place of it, whoever lacks one of `scopes` 403; so is a websocket, or else it is
    closed with 1008. Whatever goes wrong here, the app is not reached.

    `exempt` are paths that need no token, such as "/healthz", or "/public/*" for all that is below.

    Raises TypeError or ValueError for `scopes` and `exempt` that are not what they should be.
    """

    def __init__(
        self, app: ASGIApp, tokens: Validator, *, scopes: Iterable[str] = (), exempt: Iterable[str] = ()
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._scopes = frozenset(_listed("scopes", scopes, is_scope, "is no scope"))
        paths = _listed("exempt", exempt, _is_path, "must begin with a slash")
        self._exempt = frozenset(path for path in paths if not path.endswith("/*"))
        self._exempt_below = tuple(path[:-1] for path in paths if path.endswith("/*"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Guard one request."""
        if scope["type"] != "lifespan":
            if self._is_exempt(scope):
                scope["user"] = scope["auth"] = ANONYMOUS
                scope.pop("token", None)
            else:
                whole = scope.get("method") in _WITHOUT_BODY or _has_come(receive)
                try:
                    user, scope["token"] = await self._login(scope)
                except Refusal as refusal:
                    await _refuse(scope, receive, send, refusal)
                    return
                scope["user"] = scope["auth"] = user
                if not whole:
                    await self._with_body(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request that may have a body, which may be long in coming."""
        body = _Body(scope, receive, send, self._check_again)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if body.refusal is None:
                raise
        if body.refusal is not None and not body.answered:
            await refusal_response(body.refusal)(scope, receive, send)

    async def _check_again(self, scope: Scope) -> Refusal | None:
        """Say why a request that was let through may not go on, if it may not: what holds can change meanwhile."""
        user: Identity = scope["user"]
        try:
            login = await self._login(scope)
        except Refusal as refusal:
            return refusal
        if not set(user.scopes).issubset(login.user.scopes):  # the app may have looked at them already
            return Overloaded("The user's scopes changed while the request was sent. Send it again.")
        return None

    async def _login(self, scope: Scope) -> Login:
        value = bearer(scope)
        if value is None:
            raise TokenRequired
        login = await self._tokens.identify(value)
        if login is None:
            raise InvalidToken
        if not self._scopes.issubset(login.user.scopes):
            raise InsufficientScope(*sorted(self._scopes))
        return login

    def _is_exempt(self, scope: Scope) -> bool:
        """Whether a path, as the app itself has it, needs no token. What leads out of where it seems to be, does.

        Some routers cut off what they have matched before they ask (Litestar's): what was sent must be exempt, too.
        """
        if not self._exempt and not self._exempt_below:
            return False
        root: str = scope.get("root_path", "")
        raw: bytes | None = scope.get("raw_path")
        sent = raw and unquote(raw.partition(b"?")[0].decode("latin-1"))
        return self._lists(scope["path"], root) and (not sent or self._lists(sent, root))

    def _lists(self, path: str, root: str) -> bool:
        if root and (path == root or path.startswith(f"{root}/")):
            path = path[len(root) :]
        if path in self._exempt:
            return True
        return path.startswith(self._exempt_below) and _NOWHERE.isdisjoint(path[1:].removesuffix("/").split("/"))


def _has_come(receive: Receive) -> bool:
    """Whether all of a body is there already, which only uvicorn's requests tell; nearly all of them have it."""
    return getattr(getattr(receive, "__self__", None), "more_body", True) is False


class _Body:
    """The body of a request as the guarded app receives it.

    When it did not come at once, the request is authorized again as soon as it is complete. If it is refused then, the
    app sees a client that has gone, and nothing that the app still answers is sent.
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
        """Receive a part of the body."""
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        part = _Watched(self._receive())
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
        """Send a part of the answer."""
        if self.refusal is None or self.answered:
            self.answered = True
            await self._send(message)


class _Watched:
    """Awaits something, and notices whether that had to wait."""

    __slots__ = ("_awaited", "waited")

    def __init__(self, awaitable: Awaitable[Message]) -> None:
        self._awaited: Any = awaitable.__await__()
        self.waited = False

    def __await__(self) -> Generator[Any, Any, Message]:
        return cast(Generator[Any, Any, Message], self)

    def __iter__(self) -> "_Watched":
        return self

    def __next__(self) -> object:
        return self.send(None)

    def send(self, value: object) -> object:
        """Go on until it waits or ends (PEP 342)."""
        if value is None:
            found: object = next(self._awaited)
        else:
            found = self._awaited.send(value)
        self.waited = True
        return found

    def throw(self, *error: Any) -> object:
        """Raise where it waits."""
        return self._awaited.throw(*error)

    def close(self) -> None:
        """Give it up."""
        self._awaited.close()


async def _refuse(scope: Scope, receive: Receive, send: Send, refusal: Refusal) -> None:
    if scope["type"] == "http" or _DENIAL in scope.get("extensions", {}):
        await refusal_response(refusal)(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008})


def _listed(what: str, words: Iterable[str], fits: Callable[[str], bool], fault: str) -> tuple[str, ...]:
    if isinstance(words, str):
        raise TypeError(f"{what}: takes a list of strings, not one string")
    listed = tuple(words)
    for word in listed:
        if not isinstance(word, str):
            raise TypeError(f"{what}: takes a list of strings, and {word!r} is none")
        if not fits(word):
            raise ValueError(f"{what}: {word!r} {fault}")
    return listed


def _is_path(word: str) -> bool:
    return word.startswith("/")
