"""Routes: Starlette's, with a handler for each method of a path."""

import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from functools import wraps
from itertools import combinations
from typing import Any

from starlette import routing
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.errors import ConfigError
from tokenauth.web.asgi_extensions import AnswerAtOnce
from tokenauth.web.exceptions import MethodNotAllowed
from tokenauth.web.requests import Request


class Endpoint(ABC):
    """An ASGI app in place of a handler, where a profile has shown that a handler would cost too much.

    It answers its own errors: RouteIndex calls it outside of ErrorMiddleware.
    """

    @abstractmethod
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

    @abstractmethod
    def at_once(self, scope: Scope) -> AnswerAtOnce | None:
        """Answer a GET request without a body, if it can be answered without waiting (`asgi_extensions.AtOnce`)."""


Handler = Callable[[Request], Awaitable[Response]]

Handlers = Mapping[str, Handler | Endpoint]
"""Methods of a path, and what answers them."""


class Methods:
    """ASGI app that calls the handler for the method of a request. A handler of GET also answers HEAD.

    A handler of both GET and POST changes something, which HEAD must not do (RFC 9110 section 9.2.1): HEAD is refused.
    """

    def __init__(self, handlers: Handlers) -> None:
        self._apps: dict[str, ASGIApp] = {}
        for method, handler in handlers.items():
            app = handler if isinstance(handler, Endpoint) else request_response(handler)
            self._apps[method] = app
            if method == "GET" and handlers.get("POST") != handler:
                self._apps["HEAD"] = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer one request. Raises MethodNotAllowed."""
        app = self._apps.get(scope["method"])
        if app is None:
            raise MethodNotAllowed(tuple(self._apps))
        return app(scope, receive, send)


def request_response(handler: Handler) -> ASGIApp:
    """Make an ASGI app of a handler, as Starlette's function of this name does, with our Request."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await handler(Request(scope, receive, send))
        await response(scope, receive, send)

    return app


class Route(routing.Route):
    """A path and the handlers of its methods, or one Endpoint for all methods."""

    def __init__(self, path: str, endpoint: Handlers | Endpoint, middleware: Sequence[Middleware] = ()) -> None:
        app = endpoint if isinstance(endpoint, Endpoint) else Methods(endpoint)
        super().__init__(path, app, middleware=middleware)
        # Starlette's pattern ends with "$", which also matches before a newline: "/api/me%0A" is another path.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z")
        self.path = path.replace(":path}", "}")  # as it is documented and logged
        self.handlers: Handlers = {"GET": endpoint} if isinstance(endpoint, Endpoint) else endpoint
        self.guarded = bool(middleware)


def route_path(scope: Mapping[str, Any]) -> str:
    """Return the template of the route that was found, for logs and metrics: a path may contain a token by mistake."""
    route = scope.get("route")
    return "(none)" if route is None else str(route.path)


def strict(handler: Handler, query: Collection[str] = (), body: bool = False) -> Handler:
    """Refuse query parameters other than `query`, and a body unless the handler reads it.

    Otherwise a parameter that is misspelt, or in the body instead of the query, would be ignored.
    """

    @wraps(handler)
    def checked(request: Request) -> Awaitable[Response]:
        request.check_query(query)
        if not body and request.has_body:
            return without_body(request)
        return handler(request)

    async def without_body(request: Request) -> Response:
        await request.refuse_body(query)
        return await handler(request)

    return checked


def when_complete(handler: Handler) -> Handler:
    """Ignore the body, and handle the request once it is complete: one that is cut off changes nothing."""

    @wraps(handler)
    async def waiting(request: Request) -> Response:
        await request.discard_body()
        return await handler(request)

    return waiting


def refuse_collisions(owners: Mapping[str, Iterable[Route]]) -> None:
    """Raise ConfigError if two routes match one path. The error names the owners of both."""
    owned = [(owner, route.path) for owner, routes in owners.items() for route in routes]
    for (first, one), (second, other) in combinations(owned, 2):
        if _overlap(one, other):
            raise ConfigError(f"{second} and {first}: both answer {other}; give them other prefixes")


def _overlap(one: str, other: str) -> bool:
    """Return whether some path matches both templates."""
    if one.count("/") != other.count("/"):
        return False
    segments = zip(one.split("/"), other.split("/"), strict=True)
    return all(left == right or (left and right and "{" in left + right) for left, right in segments)
