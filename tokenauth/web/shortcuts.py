"""Answers the busiest paths ahead of the router."""

from collections.abc import Awaitable, Collection, Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.web.error_handling import ErrorMiddleware
from tokenauth.web.routing import Endpoint, Route


class Shortcuts:
    """ASGI middleware that finds the busiest routes in a dictionary. Starlette's router tries one after the other.

    Their paths have no parameters. The middleware of a route is called as usual.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[Route], busiest: Collection[tuple[str, str]]) -> None:
        """`busiest` are methods and paths of the routes."""
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
