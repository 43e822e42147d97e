"""Health: whether the process is alive, and whether it can serve."""

from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
from starlette.responses import Response

from tokenauth.web.requests import Request
from tokenauth.web.responses import JSONResponse
from tokenauth.web.routing import Route


class AliveAnswer(msgspec.Struct):
    status: Literal["ok"] = "ok"


class ReadyAnswer(msgspec.Struct):
    status: Literal["ready"] = "ready"


class NotReadyAnswer(msgspec.Struct):
    reason: str
    status: Literal["not ready"] = "not ready"


class HealthRoutes:
    def __init__(self, problem: Callable[[], Awaitable[str | None]]) -> None:
        """Create them. `problem` returns what keeps the service from serving, if anything does."""
        self._problem = problem

    def routes(self) -> list[Route]:
        return [Route("/healthz", {"GET": self.alive}), Route("/readyz", {"GET": self.ready})]

    async def alive(self, request: Request) -> Response:
        return JSONResponse(AliveAnswer())

    async def ready(self, request: Request) -> Response:
        problem = await self._problem()
        return JSONResponse(ReadyAnswer()) if problem is None else JSONResponse(NotReadyAnswer(problem), 503)
