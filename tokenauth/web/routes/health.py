"""Health: whether the process is alive, and whether it can serve."""

from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
from starlette.responses import Response

from tokenauth.web.requests import Request
from tokenauth.web.responses import JSONResponse
from tokenauth.web.routing import Route


class Alive(msgspec.Struct):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Ready(msgspec.Struct):
    """The service can do its work."""

    status: Literal["ready"] = "ready"


class NotReady(msgspec.Struct):
    """The service cannot do its work, and why."""

    reason: str
    status: Literal["not ready"] = "not ready"


class HealthRoutes:
    """The handlers, and their routes."""

    def __init__(self, problem: Callable[[], Awaitable[str | None]]) -> None:
        """Create them. `problem` returns what keeps the service from serving, if anything does."""
        self._problem = problem

    def routes(self) -> list[Route]:
        """List the routes."""
        return [Route("/healthz", {"GET": self.alive}), Route("/readyz", {"GET": self.ready})]

    async def alive(self, request: Request) -> Response:
        """Tell that the process is running."""
        return JSONResponse(Alive())

    async def ready(self, request: Request) -> Response:
        """Answer 200, or 503 naming what is not ready."""
        problem = await self._problem()
        return JSONResponse(Ready()) if problem is None else JSONResponse(NotReady(problem), 503)
