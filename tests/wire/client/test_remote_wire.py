"""RemoteTokens and a real issuer, over sockets."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.servers import ROOT, HandClock, Server, log_in
from tests.wire.client.issuers import HeldIssuer, token
from tokenauth.client import RemoteTokens

SERVER_MODULES = {"sqlalchemy", "argon2", "passlib", "bcrypt", "uvicorn", "alembic", "tomlkit"}


@pytest.fixture(autouse=True)
def _next_day(clock: HandClock) -> None:
    """Let all tokens expire, so that tests are independent."""
    clock.advance(25 * 3600)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as connected:
        yield connected


def who_am_i(client: httpx.Client, value: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/api/me", headers={"X-Token": value}).json()
    return found


def log_out(client: httpx.Client, value: str) -> None:
    client.delete("/api/token", headers={"X-Token": value}).raise_for_status()


async def test_it_returns_the_identity_that_the_issuer_has(
    server: Server, client: httpx.Client, clock: HandClock
) -> None:
    value = log_in(client, "ann", "ann-secret")
    me = who_am_i(client, value)
    async with RemoteTokens(server.url, clock=clock) as tokens:
        login = await tokens.identify(value.encode())
    assert login is not None
    assert (login.user.username, list(login.user.scopes)) == ("ann", ["read", "write"])
    assert (login.token.id, login.token.issued_at, login.token.expires_at, login.token.username) == (
        me["id"], me["issued_at"], me["expiry_time"], "ann",
    )  # fmt: skip


def make_named(client: httpx.Client, name: str, scopes: list[str]) -> str:
    login = {"X-Token": log_in(client, "ann", "ann-secret")}
    return str(client.post("/api/tokens", headers=login, json={"name": name, "scopes": scopes}).json()["token"])


async def test_a_named_token_has_its_name_and_only_its_scopes(
    server: Server, client: httpx.Client, clock: HandClock
) -> None:
    value = make_named(client, "nightly", ["read"])
    async with RemoteTokens(server.url, clock=clock) as tokens:
        found = await tokens.identify(value.encode())
    assert found is not None
    assert (found.user.scopes, found.token.kind, found.token.name) == (("read",), "named", "nightly")


async def test_without_max_age_a_revoked_token_fails_at_once(
    server: Server, client: httpx.Client, clock: HandClock
) -> None:
    value = log_in(client)
    async with RemoteTokens(f"{server.url}/", max_age=0, clock=clock) as tokens:
        for _ in range(2):
            assert await tokens.identify(value.encode()) is not None
        log_out(client, value)
        assert await tokens.identify(value.encode()) is None


async def test_a_token_that_expires_is_refused_in_that_second(
    server: Server, client: httpx.Client, clock: HandClock
) -> None:
    value = log_in(client)
    async with RemoteTokens(server.url, clock=clock, monotonic=lambda: 0.0) as tokens:
        login = await tokens.identify(value.encode())
        assert login is not None
        clock.set(login.token.expires_at - 0.001)
        assert await tokens.identify(value.encode()) is login
        clock.set(login.token.expires_at)
        assert await tokens.identify(value.encode()) is None


async def test_one_connection_serves_all_lookups(server: Server, clock: HandClock) -> None:
    opened = 0

    async def watch(event: str, _: object) -> None:
        nonlocal opened
        opened += event == "connection.connect_tcp.complete"

    async def trace(request: httpx.Request) -> None:
        request.extensions["trace"] = watch

    async with httpx.AsyncClient(event_hooks={"request": [trace]}) as client:
        tokens = RemoteTokens(server.url, client=client, clock=clock)
        for number in range(5):
            assert await tokens.identify(token(number)) is None
        await tokens.aclose()
        assert not client.is_closed
    assert opened == 1


async def test_proxies_of_the_environment_see_no_token(
    server: Server, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    async with RemoteTokens(server.url, clock=clock) as tokens:
        assert await tokens.identify(token(1)) is None


@pytest.mark.parametrize(
    "url",
    ["", "auth.example.com", "ftp://auth.example.com", "http://", "https://ann:hidden@auth.example.com",
     "https://ann:hid#den@auth.example.com", "https://ann:hidden:1@auth.example.com:x",
     "https://auth.example.com?token=hidden", "https://auth.example.com#hidden"],
)  # fmt: skip
def test_an_invalid_url_is_refused_and_not_quoted(url: str) -> None:
    with pytest.raises(ValueError, match="url: ") as caught:
        RemoteTokens(url)
    assert "hid" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"max_age": -1}, {"stale_grace": -1}, {"cache_size": 0}, {"timeout": 0}, {"max_age": float("nan")}],
    ids=str,
)
async def test_inconsistent_options_are_refused(options: dict[str, float], issuer: HeldIssuer) -> None:
    with pytest.raises(ValueError, match="max_age"):
        RemoteTokens("http://issuer", client=issuer.client(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["from tokenauth import TokenMiddleware", "import tokenauth.client"])
def test_a_downstream_service_imports_nothing_of_the_server(what: str) -> None:
    program = f"import sys; {what}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "tokenauth" in loaded
    assert not loaded & SERVER_MODULES
    if "client" in what:
        assert "httpx" in loaded
        assert not loaded & {"starlette", "structlog"}
