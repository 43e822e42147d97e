"""Exceptions become responses here, and a failed start becomes one line."""

import sys
from collections.abc import Awaitable, Callable, Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenauth.errors import Forbidden, InsufficientScope, NotFound, Refusal, StartError
from tokenauth.logs import describe, log
from tokenauth.web import requests
from tokenauth.web.access_log import route_path
from tokenauth.web.responses import error_response, refusal_response


async def refusal_handler(request: Request, error: Exception) -> Response:
    """Answer a refusal, and log who may not do what."""
    if isinstance(error, InsufficientScope | Forbidden):
        scope = request.scope
        log.warning(
            "access_denied",
            user=requests.username(scope) or "(unknown)",
            route=route_path(scope),
            scope=getattr(error, "scope", ""),
            reason=error.code,
        )
    return error_response(error)


async def not_found_handler(request: Request, error: Exception) -> Response:
    """Answer for a path that no route matches."""
    return refusal_response(NotFound())


HANDLERS: Mapping[type[Exception] | int, Callable[[Request, Exception], Awaitable[Response]]] = {
    Refusal: refusal_handler,
    HTTPException: not_found_handler,
}
"""What Starlette's ExceptionMiddleware answers; it is the router's 404 that is an HTTPException."""


class ErrorMiddleware:
    """Turns an unexpected exception into a response, and the traceback of a failed start into one line.

    Starlette's own ServerErrorMiddleware raises the exception again, so that the server logs it: but the text of an
    exception may hold a token. It also is outside of CORS, where a web page could not read the response.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or start and stop."""
        if scope["type"] == "lifespan":

            async def send_in_one_line(message: Message) -> None:
                error = sys.exc_info()[1]  # Starlette sends the failure while it handles the exception
                if message["type"].endswith(".failed") and error is not None:
                    message["message"] = str(error) if isinstance(error, StartError) else describe(error)
                await send(message)

            await self._app(scope, receive, send_in_one_line)
            return
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            await error_response(error)(scope, receive, send)
