"""Turns exceptions into responses, and the exception of a failed start into one line."""

import asyncio
import sys

from starlette.responses import Response
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from tokenauth.errors import Forbidden, InsufficientScope, Refusal, StartError, Stopping
from tokenauth.logs import describe, log
from tokenauth.web.exceptions import NotFound
from tokenauth.web.http_context import set_current_request
from tokenauth.web.responses import error_response
from tokenauth.web.routing import route_path


def _respond(scope: Scope, error: Exception) -> Response:
    """Return the response to an exception. Log the user if a right is missing."""
    if isinstance(error, InsufficientScope | Forbidden):
        user = scope["user"].username if "user" in scope else "(unknown)"
        log_denied(user, route_path(scope), error, getattr(error, "logged_scope", ""))
    return error_response(error)


def log_denied(username: str, route: str, refusal: Refusal, missing: str) -> None:
    """Log that a right is missing: scopes, or what the text of the refusal says."""
    problem = {"problem": str(refusal)} if isinstance(refusal, Forbidden) else {}
    log.warning("access_denied", user=username, route=route, scope=missing, reason=refusal.code, **problem)


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """Raise NotFound, for a path that no route matches; a WebSocket is closed."""
    if scope["type"] == "websocket":
        await WebSocketClose()(scope, receive, send)
    else:
        raise NotFound(NotFound.of_slash if _has_a_slash_too_many(scope) else None)


def _has_a_slash_too_many(scope: Scope) -> bool:
    """Return whether there is a route for the path without its last slash."""
    path: str = scope["path"]
    shorter = {**scope, "path": path[:-1]}
    routes = (route for route in scope["router"].routes if not isinstance(route, Mount))  # what is below, it knows
    return path.endswith("/") and any(route.matches(shorter)[0] is not Match.NONE for route in routes)


class ErrorMiddleware:
    """ASGI middleware that answers every exception, and reports a failed start or stop in one line.

    Starlette's ServerErrorMiddleware raises unexpected exceptions again, for the server to log with their texts, which
    may contain a token. It is also outside of CORS, so that a web page could not read the response.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":

            async def send_in_one_line(message: Message) -> None:
                error = sys.exc_info()[1]  # Starlette sends the failure while it handles the exception
                if message["type"].endswith(".failed") and error is not None:
                    message["message"] = str(error) if isinstance(error, StartError) else describe(error)
                await send(message)

            await self._app(scope, receive, send_in_one_line)
            return
        set_current_request(scope)
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:  # at the end of a stop
            await _respond(scope, Stopping())(scope, receive, send)
        except Exception as error:
            await _respond(scope, error)(scope, receive, send)
