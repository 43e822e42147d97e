"""`tokenauth` that gets a signal when it is about to send a request: once, or again and again until it ends.

INTERRUPTED_AT has the number of the signal, "once" or "always", the method and the start of the path.
"""

import asyncio
import os
import signal

import httpx

from tests.support import serving

send = httpx.AsyncHTTPTransport.handle_async_request


async def interrupted(transport: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
    number, times, method, path = os.environ["INTERRUPTED_AT"].split()
    if request.method == method and request.url.path.startswith(path):
        signal.raise_signal(int(number))
        while times == "always":
            await asyncio.sleep(0.01)
            signal.raise_signal(int(number))
    return await send(transport, request)


def main() -> None:
    httpx.AsyncHTTPTransport.handle_async_request = interrupted  # type: ignore[assignment, method-assign]
    serving.main()
