"""The access log: one line for each request, with the template of its route and nothing else that a client chooses."""

import time
from collections.abc import Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenauth.logs import log
from tokenauth.web.client_address import client_address
from tokenauth.web.http_context import set_current_request
from tokenauth.web.routing import route_path


class AccessLog:
    """Logs method, route, status, client address and milliseconds of each request."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        set_current_request(scope)  # also for what is answered without ErrorMiddleware
        status = 500
        started = time.perf_counter()

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
                route=self._route_path(scope),
                status=status,
                client=client_address(scope),
                ms=round((time.perf_counter() - started) * 1000, 2),
            )

    def _route_path(self, scope: Scope) -> str:
        if "route" not in scope:  # middleware answered, such as CORS a preflight
            for route in self._routes:
                if route.matches(scope)[0] is not Match.NONE:
                    scope["route"] = route
                    break
        return route_path(scope)
