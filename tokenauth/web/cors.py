"""Cross-origin requests of web pages (CORS)."""

from collections.abc import Collection, Sequence
from functools import partial

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.web.asgi_extensions import AnswerAtOnce, AtOnce


class CORS(CORSMiddleware):
    """Starlette's CORSMiddleware, for all but some paths."""

    def __init__(self, app: ASGIApp, origins: Sequence[str], headers: Sequence[str], exempt: Collection[str]) -> None:
        """Allow pages of `origins` to send the usual headers and `headers`. `exempt` are paths without CORS."""
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST", "PUT", "DELETE"),
            allow_headers=("X-Token", "Authorization", "Content-Type", "traceparent", "tracestate", *headers),
            expose_headers=("WWW-Authenticate", "Retry-After"),
        )
        self._exempt = exempt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in self._exempt:
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight, with the header that all other answers have."""
        response = super().preflight_response(request_headers)
        response.headers["Cache-Control"] = (
            "no-store"  # browsers keep preflights for Access-Control-Max-Age all the same
        )
        return response


def answer_with_cors(at_once: AtOnce) -> AtOnce:
    """Answer at once as CORS would: only a request that no page of another origin sends."""

    def look(scope: Scope) -> AnswerAtOnce | None:
        answer = None if any(name == b"origin" for name, _ in scope["headers"]) else at_once(scope)
        return None if answer is None else partial(_with_vary, answer)

    return look


def _with_vary(answer: AnswerAtOnce) -> tuple[bytes, bytes] | None:
    found = answer()
    return found and (found[0] + b"vary: Origin\r\n", found[1])
