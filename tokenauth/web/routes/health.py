"""Health: whether the process is alive, and whether it can serve."""

from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
from starlette.types import Receive, Scope, Send

from tokenauth.web.operations import Answer, operation
from tokenauth.web.responses import answer_json
from tokenauth.web.routing import Handlers


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
    """The handlers, and the addresses that they answer at."""

    def __init__(self, trouble: Callable[[], Awaitable[str | None]]) -> None:
        """Ask `trouble` what keeps the service from serving."""
        self._trouble = trouble

    def routes(self) -> dict[str, Handlers]:
        """List the addresses."""
        return {"/healthz": {"GET": self.alive}, "/readyz": {"GET": self.ready}}

    @operation(Answer(200, Alive))
    async def alive(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell that the process is running."""
        await answer_json(send, Alive())

    @operation(Answer(200, Ready), Answer(503, NotReady))
    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 200, or 503 naming what is not ready."""
        trouble = await self._trouble()
        if trouble is None:
            await answer_json(send, Ready())
        else:
            await answer_json(send, NotReady(trouble), 503)
