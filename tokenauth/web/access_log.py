"""The access log: one line for each request, with the template of its route and nothing else that a client chooses."""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenauth.logs import log
from tokenauth.web.client_address import client_address


class AccessLog:
    """Logs method, route, status, client address and milliseconds of each request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        began = time.perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            log.info(
                "request",
                method=scope["method"],
                route=route_path(scope),
                status=status,
                client=client_address(scope),
                ms=round((time.perf_counter() - began) * 1000, 2),
            )


def route_path(scope: Scope) -> str:
    """Return the template of the route that was found, never the path: it may hold a token, if only by mistake."""
    route = scope.get("route")
    return "(none)" if route is None else str(route.path)
