"""Health: whether the process is alive, and whether it can serve."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from math import inf
from time import monotonic
from typing import Literal

import msgspec
from starlette.responses import Response

from tokenauth.audit.log import AuditLog
from tokenauth.clock import Clock
from tokenauth.errors import RetryLater
from tokenauth.status import Node, NodeStatus
from tokenauth.web.requests import Request
from tokenauth.web.responses import JSONResponse
from tokenauth.web.routing import Route

_PATIENCE = 0.5
"""Seconds to wait for what the main process knows of the other workers: readiness does not depend on it."""

_KEPT = 1.0
"""Seconds for which that is kept: who asks needs no token, and the main process has other work."""


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
    def __init__(
        self, problem: Callable[[], Awaitable[str | None]], audit: AuditLog | None, node: Node, clock: Clock = monotonic
    ) -> None:
        """Create them. `problem` returns what keeps the service from serving, if anything does."""
        self._node = node
        self._problem = problem
        self._audit = audit
        self._clock = clock
        self._others_can_write = True
        self._asked_at = -inf

    def routes(self) -> list[Route]:
        return [Route("/healthz", {"GET": self.alive}), Route("/readyz", {"GET": self.ready})]

    async def alive(self, request: Request) -> Response:
        return JSONResponse(AliveAnswer())

    async def ready(self, request: Request) -> Response:
        problem = await self._problem()
        if problem is not None:
            return JSONResponse(NotReadyAnswer(problem), 503)
        return JSONResponse(ReadyAnswer(status="ready", audit=await self._audit_problem()))

    async def _audit_problem(self) -> str | None:
        """Return why the audit log cannot be written. Each worker knows only why its own acts could not be."""
        if self._audit is None:
            return None
        if self._audit.problem is not None:
            return f"cannot be written: {self._audit.problem}"
        if self._node.ask is not None and self._clock() >= self._asked_at + _KEPT:
            self._others_can_write = await _can_write(self._node.ask)
            self._asked_at = self._clock()
        return None if self._others_can_write else "cannot be written by another process: the log has the reason"


async def _can_write(ask: Callable[[], Awaitable[NodeStatus]]) -> bool:
    """Return whether all processes can write the audit log, as far as the main process knows and answers in time."""
    with suppress(RetryLater, TimeoutError):
        async with asyncio.timeout(_PATIENCE):
            return (await ask()).gauges.get(("audit_up",)) != 0
    return True
