"""Answers the busiest paths ahead of the router."""

from collections.abc import Awaitable, Collection, Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.web.error_handling import ErrorMiddleware
from tokenauth.web.routing import Endpoint, Route


class Shortcuts:
    """Middleware that calls what answers some of the routes, without trying one route after the other.

    They are GET or POST routes without parameters. Their own middleware is called as ever.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[Route], busiest: Collection[tuple[str, str]]) -> None:
        """Create it. `busiest` are methods and paths of the routes."""
        self._app = app
        self._apps: dict[tuple[str, str], tuple[Route, ASGIApp]] = {}
        for route in routes:
            for method, handler in route.handlers.items():
                if (method, route.path) in busiest:
                    app = handler if isinstance(handler, Endpoint) and not route.guarded else ErrorMiddleware(route.app)
                    self._apps[method, route.path] = route, app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass one request on."""
        if scope["type"] == "http":
            found = self._apps.get((scope["method"], scope["path"]))
            if found is not None:
                scope["route"], app = found
                return app(scope, receive, send)
        return self._app(scope, receive, send)
