"""A Starlette service guarded by tokenauth: all routes need a token, one also a scope, and one is public.

In one terminal (`make install` installs what the examples need):

    make install serve

In another:

    .venv/bin/uvicorn examples.starlette_app:app --http h11 --port 8002

In a third, log in at tokenauth and call this service with the token:

    TOKEN=$(curl -s localhost:8000/api/token -H 'Content-Type: application/json' \
        -d '{"username": "admin", "password": "admin"}' | cut -d'"' -f4)
    curl localhost:8002/greeting -H "X-Token: $TOKEN"

Set `TOKENAUTH_URL` if tokenauth is elsewhere.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from tokenauth import TokenMiddleware
from tokenauth.client import RemoteTokens
from tokenauth.errors import IssuerUnavailable

tokens = RemoteTokens(os.environ.get("TOKENAUTH_URL", "http://127.0.0.1:8000"))


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Close the connections to tokenauth on shutdown."""
    async with tokens:
        yield


async def greeting(request: Request) -> JSONResponse:
    """Greet any user with a valid token."""
    return JSONResponse({"hello": request.user.username})


@requires("admin")
async def report(request: Request) -> JSONResponse:
    """Answer users with the scope `admin`. Starlette answers 403 to all others."""
    return JSONResponse({"for": request.user.username, "scopes": request.auth.scopes})


async def health(request: Request) -> JSONResponse:
    """Answer without a token: this path is exempt."""
    return JSONResponse({"status": "ok"})


async def chat(websocket: WebSocket) -> None:
    """Read the token from the first message: browsers cannot send headers with a WebSocket."""
    await websocket.accept()
    try:
        async with asyncio.timeout(5):
            login = await tokens.identify((await websocket.receive_text()).encode())
    except (IssuerUnavailable, TimeoutError):
        await websocket.close(1013, "try again later")
        return
    except (WebSocketDisconnect, KeyError):  # the client disconnected, or sent bytes
        return
    if login is None:
        await websocket.close(1008, "log in first")
        return
    await websocket.send_json({"hello": login.user.username})
    await websocket.close()


app = Starlette(
    routes=[
        Route("/greeting", greeting),
        Route("/report", report),
        Route("/healthz", health),
        WebSocketRoute("/chat", chat),
    ],
    middleware=[Middleware(TokenMiddleware, tokens=tokens, exempt=["/healthz", "/chat"])],
    lifespan=lifespan,
)
