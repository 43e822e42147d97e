"""The baseline: an ASGI function that returns a fixed body, under the same uvicorn as tokenauth."""

import sys

from starlette.types import ASGIApp, Receive, Scope, Send

from tokenauth.server.worker import uvicorn_options
from tokenauth.settings.model import ServerSettings

BODY = b'{"valid": true, "expiry_time": 1800000000000}'  # 45 bytes
HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"45")]


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})


def build() -> ASGIApp:
    return bare


if __name__ == "__main__":
    import uvicorn

    uvicorn.Server(uvicorn_options(build, ServerSettings(port=int(sys.argv[1])))).run()
