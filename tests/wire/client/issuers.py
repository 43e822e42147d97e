"""An issuer in this process: the test sets what it answers, and when. And clocks moved by hand."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
from starlette.types import Receive, Scope, Send

from tests.support.servers import START
from tokenauth.models import public_id
from tokenauth.values import digest

Reply = tuple[int, bytes]

INVALID: Reply = (401, b'{"error": "invalid_token", "error_description": "..."}')
"""The response about a token that is not valid."""

URL = "http://issuer"


class Hand:
    """A clock that is moved by hand."""

    def __init__(self, now: float = START) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def token(number: int) -> bytes:
    """Return a value of the right form."""
    return b"%064d" % number


def me(value: bytes, **changes: Any) -> bytes:
    """Return the response about a valid token of Ann."""
    found = digest(value)
    assert found is not None
    document = {"username": "ann", "scopes": ["read"], "id": public_id(found), "issued_at": 1, "expiry_time": 2 * START}
    return json.dumps({**document, "expiry_time": int(2 * START), **changes}).encode()


class HeldIssuer:
    """An issuer that decides when a request arrives, and responds when `gate` is open. `asked` lists the tokens."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._more = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.reply: Callable[[bytes], Reply] = lambda value: (200, me(value))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        value = dict(scope["headers"])[b"x-token"]
        self.asked.append(value)
        self._more.set()
        status, body = self.reply(value)
        await self.gate.wait()
        headers = [(b"location", b"http://elsewhere/")] if status == 307 else []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def client(self, **options: Any) -> httpx.AsyncClient:
        """Return a client that reaches this issuer under any address."""
        return httpx.AsyncClient(transport=httpx.ASGITransport(self), **options)

    async def await_requests(self, count: int) -> None:
        """Wait until `count` requests have arrived."""
        async with asyncio.timeout(20):
            while len(self.asked) < count:
                self._more.clear()
                await self._more.wait()


async def turns() -> None:
    """Run all tasks as far as they get without time passing."""
    for _ in range(50):
        await asyncio.sleep(0)
