"""Health: whether the process is alive, and whether it can serve."""

from collections.abc import Awaitable, Callable

from starlette.types import Receive, Scope, Send

from tokenauth.routes.refusals import answer_json
from tokenauth.routes.table import Handlers


class HealthRoutes:
    """The handlers, and the addresses that they answer at."""

    def __init__(self, trouble: Callable[[], Awaitable[str | None]]) -> None:
        """Ask `trouble` what keeps the service from serving."""
        self._trouble = trouble

    def routes(self) -> dict[str, Handlers]:
        """List the addresses."""
        return {"/healthz": {"GET": self.alive}, "/readyz": {"GET": self.ready}}

    async def alive(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer: that says it."""
        await answer_json(send, {"status": "ok"})

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 200, or 503 naming what is not ready."""
        trouble = await self._trouble()
        if trouble is None:
            await answer_json(send, {"status": "ready"})
        else:
            await answer_json(send, {"status": "not ready", "reason": trouble}, 503)
