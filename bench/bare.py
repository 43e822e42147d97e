"""The yardstick: an ASGI function that answers a fixed body, on the very server that tokenauth runs on."""

import sys

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.server.worker import uvicorn_options
from tokenauth.settings.model import ServerSettings

BODY = b'{"valid": true, "expiry_time": 1800000000000}'  # 45 bytes
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"45")]


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer what is always the same."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})


def build() -> ASGIApp:
    """Build the app."""
    return bare


if __name__ == "__main__":
    import uvicorn

    uvicorn.Server(uvicorn_options(build, ServerSettings(port=int(sys.argv[1])))).run()
