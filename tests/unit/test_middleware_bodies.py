"""TokenMiddleware authorizes a request again when its late body is complete, with every framework."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.unit.test_middleware import FixedValidator
from tokenauth.errors import StoreUnavailable
from tokenauth.models import Identity, Login
from tokenauth.web.middleware import TokenMiddleware

Act = Callable[[], None]


def plain_app(act: Act) -> ASGIApp:
    """Return an ASGI app that calls `act` when it has read the body."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] == "http.request":
            if not message.get("more_body"):
                act()
                break
        await JSONResponse("done")(scope, receive, send)

    return app


def starlette_app(act: Act) -> ASGIApp:
    """Return such an app with Starlette."""

    async def endpoint(request: Request) -> JSONResponse:
        await request.json()
        act()
        return JSONResponse("done")

    return Starlette(routes=[Route("/", endpoint, methods=["POST"])])


def fastapi_app(act: Act) -> ASGIApp:
    """Return such an app with FastAPI, which answers 400 to any error while it reads a body."""
    from fastapi import Body, FastAPI

    app = FastAPI(openapi_url=None)

    @app.post("/")
    async def endpoint(document: Annotated[dict[str, Any], Body()]) -> str:
        act()
        return "done"

    return app


class CountingValidator(FixedValidator):
    """A validator that counts its calls."""

    calls = 0

    async def identify(self, value: bytes) -> Login | None:
        """Look a token up."""
        self.calls += 1
        return await super().identify(value)

    def revoke(self) -> None:
        """Revoke the token."""
        self.logins.clear()

    def break_store(self) -> None:
        """Make the store unavailable."""
        self.error = StoreUnavailable()

    def scope(self, *scopes: str) -> None:
        """Change the user's scopes."""
        self.logins[b"anns"] = self.logins[b"anns"]._replace(user=Identity("ann", scopes))


ARRIVALS: dict[str, list[Any]] = {
    "at once": [b'{"a": 1}'],
    "in parts": [b'{"a"', b": 1}"],
    "late": [None, b'{"a": 1}'],
    "in late parts": [b'{"a"', None, b": 1}", None, b""],
}
"""The parts of a body. None means that the app has to wait."""

CHANGES: dict[str, tuple[Callable[[CountingValidator], None], int]] = {
    "nothing": (lambda tokens: None, 200),
    "more scopes": (lambda tokens: tokens.scope("read", "write"), 200),
    "revoked": (CountingValidator.revoke, 401),
    "needed scope lost": (lambda tokens: tokens.scope(), 403),
    "other scope lost": (lambda tokens: tokens.scope("needed"), 503),
    "store broken": (CountingValidator.break_store, 503),
}


async def ask(app: ASGIApp, arrival: list[Any], meanwhile: Callable[[], None]) -> tuple[int, bytes]:
    """Send a request with a body in parts. Call `meanwhile` before the last part."""
    parts = list(arrival)
    sent: list[Message] = []

    async def receive() -> Message:
        while parts and parts[0] is None:
            parts.pop(0)
            await asyncio.sleep(0)
        if len(parts) == 1:
            meanwhile()
        body = parts.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(parts)}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"x-token", b"anns"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
    await app(scope, receive, send)
    start, *bodies = sent
    return start["status"], b"".join(body["body"] for body in bodies)


@pytest.mark.parametrize("make", [plain_app, starlette_app, fastapi_app])
@pytest.mark.parametrize("arrival", ARRIVALS)
@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_before_the_body_is_complete_applies(
    make: Callable[[Act], ASGIApp], arrival: str, change: str
) -> None:
    tokens, acts = CountingValidator("needed", "read"), list[str]()
    apply, status = CHANGES[change]
    if change in {"more scopes", "needed scope lost"}:
        tokens.scope("read") if change == "more scopes" else tokens.scope("needed")
    scopes = ["needed"] if change == "needed scope lost" else []
    app = TokenMiddleware(make(lambda: acts.append("done")), tokens, scopes=scopes)
    answer = await ask(app, ARRIVALS[arrival], lambda: apply(tokens))
    if arrival == "at once":  # authorized once, when all of it had arrived
        status = 200
    assert answer[0] == status, answer
    assert acts == (["done"] if status == 200 else [])
    assert tokens.calls == (1 if arrival == "at once" else 2)


async def test_an_answer_begun_before_the_body_continues() -> None:
    tokens = CountingValidator()

    async def early(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive()).get("more_body"):
            pass
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.body", "body": b"end"})

    assert await ask(TokenMiddleware(early, tokens), ARRIVALS["in parts"], tokens.revoke) == (200, b"end")


class Cycle:
    """The part of uvicorn's request cycle that the middleware uses."""

    def __init__(self, more_body: bool) -> None:
        self.more_body = more_body

    async def receive(self) -> Message:
        """Receive all of the body."""
        return {"type": "http.request", "body": b"{}", "more_body": False}


@pytest.mark.parametrize("more_body", [False, True])
async def test_only_an_incomplete_request_is_wrapped(more_body: bool) -> None:
    receive, reached = Cycle(more_body).receive, list[Receive]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(receive)

    async def send(_: Message) -> None:
        pass

    scope = {"type": "http", "method": "PUT", "path": "/", "headers": [(b"x-token", b"anns")]}
    await TokenMiddleware(app, FixedValidator())(scope, receive, send)
    assert (reached == [receive]) is not more_body
