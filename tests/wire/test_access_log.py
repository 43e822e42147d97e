"""The access log is off by default. When it is on, it has one line per request, without secrets."""

import base64
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.journal import until
from tests.support.servers import HandClock, Server, exchange, log_in, worker, write_config

SECRETS = ["admin-mistyped-password", "wrong-secret"]


@pytest.fixture(scope="module")
def settings() -> str:
    return "[server]\naccess_log = true"


def logged(server: Server, since: int, wanted: int) -> list[dict[str, Any]]:
    """Wait for `wanted` lines after the first `since`: a line is written after the response."""
    until(lambda: len(server.events("request")) >= since + wanted, "the requests are logged")
    return server.events("request")[since:]


def misuses(token: str) -> list[bytes]:
    """List requests with a token or a password in expected and unexpected places."""
    targets = [
        f"GET /api/token?token={token}",
        f"GET /api/token?x=1&token={token}&token=x",
        f"GET /api/me?token={token}",
        f"GET /api/tokens?user={token}",
        f"DELETE /api/tokens/{token}",
        f"DELETE /api/tokens/{token[:24]}",
        f"GET /api/pools/{token}",
        f"POST /api/pools/p/leases?holder={token}",
        f"PUT /api/pools/p/leases/{token}",
        f"DELETE /api/pools/{token}/tokens/{token}",
        f"GET /api/pools/p/{token}/",
        f"GET /api/token/{token}",
        f"GET /api/token/{token}/",
        f"GET /{token}",
        f"GET /api/token%3Ftoken={token}",
        f"GET /api/token;token={token}",
        f"GET http://{token}/healthz",
        f"PUT /api/token?{token}",
        f"OPTIONS /{token}",
        f"GET /healthz?{token}",
        f"POST /api/token?password={SECRETS[0]}",
        f"GET /{''.join(f'%{ord(letter):02x}' for letter in token)}?{'x' * 9000}",
    ]
    headers = (
        f"Host: {token}\r\nX-Token: {token}\r\nCookie: token={token}\r\nUser-Agent: {token}\r\nReferer: /{token}\r\n"
    )
    bodies = [
        ("POST", f'{{"username": "{SECRETS[0]}", "password": "{SECRETS[1]}"}}'),
        ("POST", f'{{"username": "admin", "password": "{SECRETS[1]}"}}'),
        ("POST", f'{{"username": ["{token}"], "password": "{SECRETS[1]}"}}'),
        ("POST", f'{{"{token}": "{SECRETS[1]}"'),
        ("DELETE", f'{{"token": "{token}",}}'),
    ]
    return [
        *[f"{target} HTTP/1.1\r\n{headers}\r\n".encode() for target in targets],
        *[
            f"{method} /api/token HTTP/1.1\r\n{headers}Content-Length: {len(body)}\r\n\r\n{body}".encode()
            for method, body in bodies
        ],
        f"{token} / HTTP/1.1\r\n\r\n".encode(),  # not HTTP: no line in the access log
    ]


@pytest.mark.parametrize(
    ("method", "path", "route", "status"),
    [
        ("GET", "/healthz", "/healthz", 200),
        ("GET", "/api/token?token=x", "/api/token", 200),
        ("POST", "/api/token", "/api/token", 400),
        ("DELETE", "/api/token", "/api/token", 200),
        ("PUT", "/api/token", "/api/token", 405),
        ("HEAD", "/api/me", "/api/me", 401),
        ("GET", "/api/tokens?user=x", "/api/tokens", 401),
        ("DELETE", f"/api/tokens/{'0' * 24}", "/api/tokens/{id}", 401),
        ("GET", "/api/pools", "/api/pools", 401),
        ("POST", "/api/pools/gpus/leases?x=1", "/api/pools/{pool}/leases", 401),
        ("PUT", "/api/pools/gpus/leases/a-token", "/api/pools/{pool}/leases/{token}", 401),
        ("DELETE", "/api/pools/gpus/tokens/a-token", "/api/pools/{pool}/tokens/{token}", 401),
        ("GET", "/api/pools/gpus/a-token", "(none)", 404),
        ("GET", "/nothing/here?x=1", "(none)", 404),
        ("GET", "/healthz/", "(none)", 404),
    ],
)
def test_each_request_makes_one_log_line(
    server: Server, client: httpx.Client, method: str, path: str, route: str, status: int
) -> None:
    since = len(server.events("request"))
    client.request(method, path)
    client.get("/readyz")
    line, end = logged(server, since, 2)
    assert end["route"] == "/readyz"
    assert 0 <= line.pop("ms") < 10_000
    assert line.pop("timestamp")
    assert line == {
        "event": "request",
        "level": "info",
        "method": method,
        "route": route,
        "status": status,
        "client": "127.0.0.1",
    }


@pytest.mark.parametrize(("setting", "on"), [("", False), ("[server]\naccess_log = true", True)])
def test_the_access_log_is_off_and_free_of_secrets(tmp_path: Path, clock: HandClock, setting: str, on: bool) -> None:
    with worker(write_config(tmp_path, setting), clock) as running:
        with running.client() as client:
            token = log_in(client)
        sent = misuses(token)
        for raw in sent:
            assert exchange(running.port, raw)[0] < 500
        running.stop()
        assert len(running.events("request")) == (
            len(sent) if on else 0
        )  # one line for the login, none for the last of `sent`
        log = running.log.read_text()
    assert ("/api/token" in log) is on
    encoded = base64.b64encode(token.encode()).decode()
    for secret in [token, token[:24], token[8:], token.lower(), token.upper(), encoded, *SECRETS]:
        assert secret not in log


def test_a_preflight_is_logged_with_its_route(tmp_path: Path, clock: HandClock) -> None:
    settings = '[server]\naccess_log = true\ncors_origins = ["https://app.example"]'
    with worker(write_config(tmp_path, settings), clock) as running, running.client() as client:
        origin = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        assert client.options("/api/token", headers=origin).status_code == 200
        client.get("/readyz")
        line, _ = logged(running, 0, 2)
    assert (line["method"], line["route"]) == ("OPTIONS", "/api/token")
