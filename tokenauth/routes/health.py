"""Health: whether the process is alive, and whether it can serve."""

from collections.abc import Awaitable, Callable

from starlette.types import Receive, Scope, Send

from tokenauth.errors import MethodNotAllowed
from tokenauth.routes.refusals import answer_json


async def healthz(scope: Scope, receive: Receive, send: Send) -> None:
    """GET /healthz: the process answers."""
    _only_get(scope)
    await answer_json(send, {"status": "ok"})


class ReadyEndpoint:
    """ASGI app of /readyz: 200, or 503 naming what is not ready."""

    def __init__(self, trouble: Callable[[], Awaitable[str | None]]) -> None:
        self._trouble = trouble

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        _only_get(scope)
        trouble = await self._trouble()
        if trouble is None:
            await answer_json(send, {"status": "ready"})
        else:
            await answer_json(send, {"status": "not ready", "reason": trouble}, 503)


def _only_get(scope: Scope) -> None:
    if scope["method"] not in {"GET", "HEAD"}:
        raise MethodNotAllowed(("GET", "HEAD"))
