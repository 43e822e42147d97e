"""TokenMiddleware in somebody else's app: what it lets through, and what it answers in place of the app."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.servers import write_config
from tokenauth.configfile import load
from tokenauth.middleware import TokenMiddleware
from tokenauth.service import Service, create_service


async def whoami(request: Request) -> JSONResponse:
    return JSONResponse([request.scope["user"].username, request.scope["token"].expires_at])


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """Run a service in this process."""
    service = create_service(load(write_config(tmp_path)))
    async with service.running():
        yield service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """Speak to a Starlette app that is guarded."""
    app = TokenMiddleware(Starlette(routes=[Route("/", whoami)]), service.tokens)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        yield client


async def test_a_valid_token_reaches_the_app_with_its_user(service: Service, client: httpx.AsyncClient) -> None:
    issued = await service.tokens.issue("ann", "ann-secret", "127.0.0.1", "test")
    for headers in ({"X-Token": issued.value}, {"Authorization": f"Bearer {issued.value}"}):
        answer = await client.get("/", headers=headers)
        assert answer.json() == ["ann", issued.token.expires_at]


async def test_whoever_sends_no_valid_token_is_answered_in_place_of_the_app(client: httpx.AsyncClient) -> None:
    missing, wrong = await client.get("/"), await client.get("/", headers={"X-Token": "x"})
    assert (missing.status_code, wrong.status_code) == (401, 401)
    assert missing.headers["www-authenticate"] == 'Bearer realm="tokenauth"'
    assert wrong.headers["www-authenticate"] == 'Bearer realm="tokenauth", error="invalid_token"'
    both = await client.get("/", headers={"X-Token": "x", "Authorization": "Bearer y"})
    assert both.status_code == 400


async def test_a_websocket_without_a_token_is_closed(service: Service) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def unreachable(*_: Any) -> None:
        raise AssertionError("the app was reached")

    await TokenMiddleware(unreachable, service.tokens)({"type": "websocket", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_a_broken_store_lets_nobody_through(service: Service, client: httpx.AsyncClient, tmp_path: Path) -> None:
    issued = await service.tokens.issue("ann", "ann-secret", "127.0.0.1", "test")
    (tmp_path / "tokenauth.db").unlink()
    (tmp_path / "tokenauth.db").write_bytes(b"another file")
    service.store._watch()  # type: ignore[attr-defined]  # rather than wait a second for it
    answer = await client.get("/", headers={"X-Token": issued.value})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
