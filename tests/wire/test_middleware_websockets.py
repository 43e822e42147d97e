"""TokenMiddleware and WebSockets, with uvicorn and a WebSocket client."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.unit.test_middleware import FixedValidator
from tokenauth.errors import IssuerUnavailable
from tokenauth.web.middleware import TokenMiddleware


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Send a greeting with the username, then return each message."""
    if scope["type"] != "websocket":
        return
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": f"hello {scope['user'].username}"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})


@contextmanager
def serving(app: ASGIApp, protocol: str) -> Iterator[str]:
    """Serve an app on a free port and return its WebSocket URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, ws=protocol, lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"ws://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def without_denials(app: ASGIApp) -> ASGIApp:
    """Remove the ASGI extension for denial responses, as on an older server."""

    async def older(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "extensions": {}}, receive, send)

    return older


@pytest.fixture(scope="module", params=["websockets-sansio"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve an app that needs the scope `read`, except at "/open"."""
    app = TokenMiddleware(echo, FixedValidator("read"), scopes=["read"], exempt=["/open"])
    with serving(app, request.param) as running:
        yield running


def open_websocket(address: str, path: str = "/", **headers: str) -> ClientConnection:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return connect(f"{address}{path}", additional_headers=named, proxy=None)


def refusal(address: str, **headers: str) -> tuple[int, str]:
    """Return the status and the error code with which a WebSocket is refused."""
    with pytest.raises(InvalidStatus) as caught, open_websocket(address, **headers):
        pass
    answer = caught.value.response
    return answer.status_code, json.loads(answer.body)["error"] if answer.body else ""


@pytest.mark.parametrize(
    "headers", [{"X_Token": "anns"}, {"Authorization": "Bearer anns"}], ids=lambda sent: next(iter(sent))
)
def test_a_websocket_with_a_token_is_accepted(address: str, headers: dict[str, str]) -> None:
    with open_websocket(address, **headers) as connection:
        assert connection.recv() == "hello ann"
        connection.send("and?")
        assert connection.recv() == "and?"


def test_a_websocket_on_an_exempt_path_is_anonymous(address: str) -> None:
    with open_websocket(address, "/open") as connection:
        assert connection.recv() == "hello "


def test_a_websocket_needs_a_valid_token_like_a_request(address: str) -> None:
    assert refusal(address) == (401, "token_required")
    assert refusal(address, X_Token="x") == (401, "invalid_token")
    assert refusal(address, X_Token="x", Authorization="Bearer y") == (400, "invalid_request")


@pytest.mark.parametrize(
    ("tokens", "refused"),
    [
        (FixedValidator(), (403, "insufficient_scope")),
        (FixedValidator("read", error=IssuerUnavailable()), (503, "issuer_unavailable")),
    ],
    ids=["scope", "issuer"],
)
def test_a_websocket_is_refused_like_a_request(tokens: FixedValidator, refused: tuple[int, str]) -> None:
    with serving(TokenMiddleware(echo, tokens, scopes=["read"]), "websockets-sansio") as address:
        assert refusal(address, X_Token="anns") == refused


def test_without_denial_responses_it_closes_unaccepted() -> None:
    """Uvicorn turns a close with 1008 before the handshake into an HTTP 403."""
    with serving(without_denials(TokenMiddleware(echo, FixedValidator())), "websockets-sansio") as address:
        assert refusal(address) == (403, "")
        with open_websocket(address, X_Token="anns") as connection:
            assert connection.recv() == "hello ann"
