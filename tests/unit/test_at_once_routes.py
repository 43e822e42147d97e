"""The application tells the server what it can answer at once: checks of tokens."""

import asyncio
import gc
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from tests.support.servers import write_config
from tokenauth.credentials import Candidate
from tokenauth.service import Service, create_service
from tokenauth.settings import loader
from tokenauth.web.app import build_app
from tokenauth.web.asgi_extensions import AT_ONCE

INVALID = b'{"valid":false,"expiry_time":null}\n'
LIFESPAN = {"type": "lifespan", "asgi": {"version": "3.0"}}


@asynccontextmanager
async def started(directory: Path, more: str = "") -> AsyncIterator[tuple[Service, Mapping[str, Any]]]:
    """Start the application as a server does, and yield its service and the state that the server gets."""
    service = create_service(loader.load(write_config(directory, more)))
    state: dict[str, Any] = {}
    ended, sent, threshold = asyncio.Event(), asyncio.Queue[Message](), gc.get_threshold()
    received = iter(["lifespan.startup"])

    async def receive() -> Message:
        found = next(received, None)
        if found is None:
            await ended.wait()
        return {"type": found or "lifespan.shutdown"}

    running = asyncio.ensure_future(build_app(service)({**LIFESPAN, "state": state}, receive, sent.put))
    try:
        assert await sent.get() == {"type": "lifespan.startup.complete"}
        yield service, state
    finally:
        ended.set()
        await running
        gc.unfreeze()
        gc.set_threshold(*threshold)


async def issue(service: Service) -> bytes:
    """Return the value of a new token, which no process has looked up."""
    user = await service.credentials.verify(Candidate("ann", "ann-secret"), "127.0.0.1")
    return (await service.tokens.grant(user, "127.0.0.1", "test", lambda: False, None)).value.encode()


def ask(state: Mapping[str, Any], value: bytes, *headers: tuple[bytes, bytes]) -> list[tuple[bytes, bytes] | None]:
    """Return the lines of the headers and the body that each route answers at once for a token, or None."""
    token = (b"x-token", value)
    scopes = [
        {"path": "/api/token", "query_string": b"token=" + value, "headers": headers},
        {"path": "/api/token", "query_string": b"", "headers": [token, *headers]},
        {"path": "/auth", "query_string": b"", "headers": [token, *headers]},
        {"path": "/auth", "query_string": b"scope=read", "headers": [token, *headers]},
    ]
    found = []
    for scope in scopes:
        route, at_once = state[AT_ONCE][scope["path"]]
        assert route.path == scope["path"]
        answer = at_once({"type": "http", "method": "GET", **scope})
        found.append(answer and answer())
    return found


async def test_checks_of_tokens_are_answered_at_once(tmp_path: Path) -> None:
    """Also of unknown ones, except those that a reverse proxy asks for: the application logs why they may not pass."""
    async with started(tmp_path) as (service, state):
        assert state[AT_ONCE].keys() == {"/api/token", "/auth"}
        value = await issue(service)
        check, by_header, auth, with_scope = ask(state, value)
        await service.tokens.revoke(value)
        assert [sent and sent[1] for sent in ask(state, value)] == [INVALID, INVALID, None, None]
    assert check == by_header
    assert check is not None
    assert b"content-length: 40\r\n" in check[0]
    assert b"vary" not in check[0]
    assert auth is not None
    assert b"x-auth-user: ann\r\n" in auth[0]
    assert with_scope is not None


@pytest.mark.parametrize("origin", [b"", b"https://app.example.com"])
async def test_pages_of_other_origins_are_left_to_the_application(tmp_path: Path, origin: bytes) -> None:
    headers = [(b"origin", origin)] if origin else []
    async with started(tmp_path, '[server]\ncors_origins = ["https://app.example.com"]') as (service, state):
        check, by_header, auth, _ = ask(state, await issue(service), *headers)
    assert check == by_header
    assert (check is None) is bool(origin)
    assert check is None or check[0].endswith(b"vary: Origin\r\n")
    assert auth is not None
    assert b"vary" not in auth[0]


async def test_nothing_is_answered_at_once_if_each_request_is_logged(tmp_path: Path) -> None:
    async with started(tmp_path, "[server]\naccess_log = true") as (_, state):
        assert state[AT_ONCE] == {}
