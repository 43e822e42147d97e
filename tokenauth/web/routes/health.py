"""Health: whether the process is alive, and whether it can serve."""

from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
from starlette.responses import Response

from tokenauth.audit.log import AuditLog
from tokenauth.web.requests import Request
from tokenauth.web.responses import JSONResponse
from tokenauth.web.routing import Route


class AliveAnswer(msgspec.Struct):
    status: Literal["ok"] = "ok"


class ReadyAnswer(msgspec.Struct, kw_only=True, omit_defaults=True):
    status: Literal["ready"]
    audit: str | None = None
    """Why the audit log cannot be written, if so: that stops no request."""


class NotReadyAnswer(msgspec.Struct):
    reason: str
    status: Literal["not ready"] = "not ready"


class HealthRoutes:
    def __init__(self, problem: Callable[[], Awaitable[str | None]], audit: AuditLog | None) -> None:
        """Create them. `problem` returns what keeps the service from serving, if anything does."""
        self._problem = problem
        self._audit = audit

    def routes(self) -> list[Route]:
        return [Route("/healthz", {"GET": self.alive}), Route("/readyz", {"GET": self.ready})]

    async def alive(self, request: Request) -> Response:
        return JSONResponse(AliveAnswer())

    async def ready(self, request: Request) -> Response:
        problem = await self._problem()
        if problem is not None:
            return JSONResponse(NotReadyAnswer(problem), 503)
        reason = None if self._audit is None else self._audit.problem
        audit = None if reason is None else f"cannot be written: {reason}"
        return JSONResponse(ReadyAnswer(status="ready", audit=audit))
